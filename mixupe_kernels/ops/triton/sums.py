"""gather_sum and row_dot: the gradients of mixing, and mixing of more than two samples. No atomics: one order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...conventions import accumulate_dtype
from ..arguments import check_products, check_sum
from .launch import Tile, launch_tiled, packs

# A program adds up this many tiles of a row_dot before another takes over: long rows (3·224·224) fill the device
# even where there are few of them.
TILES_A_PROGRAM = 8


@triton.jit(do_not_specialize=["terms", "sources", "size", "src_stride"])
def gather_rows(
    out, src, index, weight, offsets,
    terms, sources, size, src_stride,
    SIZE_PACK: tl.constexpr, SRC_PACK: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n, tiles): one tile of one output, its terms in the order of t. ``size`` and strides are in packs."""
    size, src_stride = size * SIZE_PACK, src_stride.to(tl.int64) * SRC_PACK
    j = tl.program_id(0)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = step < size
    first = tl.maximum(tl.load(offsets + j), 0)
    last = tl.minimum(tl.load(offsets + j + 1), terms)
    total = tl.zeros((BLOCK,), ACC)
    # The interpreter of Triton 3.6 makes no int of a bound known only at run time where NumPy is 2.5: so no range.
    t = first
    while t < last:
        source = tl.load(index + t)
        readable = (source >= 0) & (source < sources)
        factor = tl.where(readable, tl.load(weight + t).to(ACC), float("nan"))
        total += factor * tl.load(src + (source * src_stride + step), mask=mask & readable, other=0.0).to(ACC)
        t += 1
    tl.store(out + (j.to(tl.int64) * size + step), total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["a_rows", "b_rows", "size", "a_stride", "b_stride"])
def dot_rows(
    out, a, b, a_index, b_index,
    a_rows, b_rows, size, a_stride, b_stride,
    SIZE_PACK: tl.constexpr, A_PACK: tl.constexpr, B_PACK: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """Grid (n, parts), part t of each product into ``out`` (parts, n). ``size`` and strides are in packs."""
    size, a_stride, b_stride = size * SIZE_PACK, a_stride.to(tl.int64) * A_PACK, b_stride.to(tl.int64) * B_PACK
    t = tl.program_id(0)
    part = tl.program_id(1)
    a_row, b_row = tl.load(a_index + t), tl.load(b_index + t)
    readable = (a_row >= 0) & (a_row < a_rows) & (b_row >= 0) & (b_row < b_rows)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for start in tl.range(0, SPAN, BLOCK, num_stages=num_stages):
        step = part * SPAN + start + tl.arange(0, BLOCK)
        mask = (step < size) & readable
        left = tl.load(a + (a_row * a_stride + step), mask=mask, other=0.0).to(out.dtype.element_ty)
        right = tl.load(b + (b_row * b_stride + step), mask=mask, other=0.0).to(out.dtype.element_ty)
        total += left * right
    tl.store(out + (part.to(tl.int64) * tl.num_programs(0) + t), tl.where(readable, tl.sum(total, 0), float("nan")))


@triton.jit(do_not_specialize=["n", "parts"])
def add_parts(out, partial, n, parts, BLOCK: tl.constexpr):
    """The second stage: the parts of each product, in their order."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < n
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    part = 0  # and while: as in gather_rows
    while part < parts:
        total += tl.load(partial + part * n.to(tl.int64) + t, mask=mask, other=0.0)
        part += 1
    tl.store(out + t, total, mask=mask)


def contiguous_rows(x: Tensor) -> Tensor:
    """``x``, copied only where its rows are not contiguous: outputs here are, as the reference's."""
    return x if x[:1].is_contiguous() else x.contiguous()


def gather_sum(src: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums of rows of ``src`` (M, ...), (J, ...) in its dtype, in one launch; as ``reference.gather_sum``."""
    check_sum(src, index, weight, offsets)
    n = offsets.shape[0] - 1
    out = torch.empty((n, *src.shape[1:]), dtype=src.dtype, device=src.device)
    if out.numel() == 0:
        return out
    if src.shape[0] == 0:
        return out.zero_()
    src, index, weight, offsets = contiguous_rows(src), index.contiguous(), weight.contiguous(), offsets.contiguous()
    size = out[0].numel()
    (sizes, size_pack), (strides, pack) = packs(size), packs(src.stride(0))

    def run(tile: Tile) -> None:
        gather_rows[(n, triton.cdiv(size, tile.block))](
            out, src, index, weight, offsets, index.shape[0], src.shape[0], sizes, strides,
            SIZE_PACK=size_pack, SRC_PACK=pack, ACC=tl.float64 if src.dtype == torch.float64 else tl.float32,
            BLOCK=tile.block, **tile.launch,
        )  # fmt: skip

    launch_tiled("sum", src, size, run)
    return out


def row_dot(a: Tensor, b: Tensor, a_index: Tensor, b_index: Tensor) -> Tensor:
    """⟨a[a_index_t], b[b_index_t]⟩, (T,), in one launch or two where rows are long; as ``reference.row_dot``."""
    check_products(a, b, a_index, b_index)
    n = a_index.shape[0]
    out = torch.empty(n, dtype=accumulate_dtype(a.dtype), device=a.device)
    if n == 0:
        return out
    if a.numel() == 0 or b.numel() == 0:
        return out.zero_()
    a, b, a_index, b_index = contiguous_rows(a), contiguous_rows(b), a_index.contiguous(), b_index.contiguous()
    size = a[0].numel()
    (sizes, size_pack), (a_strides, a_pack), (b_strides, b_pack) = map(packs, (size, a.stride(0), b.stride(0)))

    def run(tile: Tile) -> None:
        span = TILES_A_PROGRAM * tile.block if size > tile.block else tile.block
        parts = triton.cdiv(size, span)
        partial = out if parts == 1 else torch.empty((parts, n), dtype=out.dtype, device=out.device)
        dot_rows[(n, parts)](
            partial, a, b, a_index, b_index, a.shape[0], b.shape[0], sizes, a_strides, b_strides,
            SIZE_PACK=size_pack, A_PACK=a_pack, B_PACK=b_pack, BLOCK=tile.block, SPAN=span, **tile.launch,
        )  # fmt: skip
        if parts > 1:
            add_parts[(triton.cdiv(n, 128),)](out, partial, n, parts, BLOCK=128, num_warps=4, num_stages=1)

    launch_tiled("sum", a, size, run)
    return out
