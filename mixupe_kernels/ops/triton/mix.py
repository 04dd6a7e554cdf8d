"""mix: x̃_i = λ_i f(x_i) + (1 - λ_i) f(x_partner(i)), at one read and one write of the batch.

Tiles are launched batch index fastest, so that all samples' first tiles run before their second ones and the partner's
tile is still in the L2 cache when it is asked for again. A flipped batch needs no cache: ``mix_pairs`` reads samples i
and B - 1 - i once and writes both, also in place. mixed_target: what goes with the rows of a batch, by row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...conventions import row_format
from ..arguments import Mixing, check_box, check_target
from .box import divide, inside_box, own_bit, read_at
from .launch import Tile, device_of, launch_tiled, packs, reciprocal

# The arguments of size, which no kernel is compiled for.
SIZES = [
    "batch",
    "plane",
    "out_stride",
    "x_stride",
    "channel_size",
    "height",
    "width",
    "by_channel",
    "by_height",
    "by_width",
]

# Planes shorter than this share a tile, which then works out each element's channel.
SHORTEST_PLANE = 256


@triton.jit
def weight_of(lam, i, LAM_STRIDE: tl.constexpr, inside, ACC: tl.constexpr):
    """λ_i; NaN outside [0, 1], which makes the sample NaN."""
    weight = tl.load(lam + i * LAM_STRIDE).to(ACC)
    return tl.where(inside & (weight >= 0) & (weight <= 1), weight, float("nan"))


@triton.jit
def load_samples(x, place, mask, ACC: tl.constexpr):
    """A tile of a sample. What is not read is -0, whose product with a weight of 0 leaves every other summand as it is; Triton's
    compiler makes 0 of it, and so of a copied -0."""
    if x.dtype.element_ty.is_floating():
        return tl.load(x + place, mask=mask, other=-0.0).to(ACC)
    else:
        return tl.load(x + place, mask=mask, other=0).to(ACC)


@triton.jit
def blend(own, other, weight, cut, LEAVE_OWN: tl.constexpr, LEAVE_OTHER: tl.constexpr):
    """A weight of 1 or 0 copies exactly, whatever the other sample holds; ``cut`` elements are the other's.

    A sample of weight 0 that is read for the sake of others is left out (LEAVE_OWN, LEAVE_OTHER): its product may be a NaN.
    What is cut is chosen before the sum. A choice after it would be made between rounded values, and rounding
    one element at a time is slower than rounding pairs.
    """
    own_part, other_part = own, other
    if LEAVE_OWN:
        own_part = tl.where(weight == 0, -0.0, own)
    if LEAVE_OTHER:
        other_part = tl.where(weight == 1, -0.0, other)
    if cut is None:
        return weight * own_part + (1 - weight) * other_part
    else:
        return weight * tl.where(cut, -0.0, own_part) + tl.where(cut, other, (1 - weight) * other_part)


@triton.jit
def places(
    plane, channel_size, by_channel, CHANNELS: tl.constexpr, PER_CHANNEL: tl.constexpr,
    X_LAST: tl.constexpr, OUT_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(where to write, where to read, channel, pixel of that, valid) of a tile's elements within a sample, in the order of the output.

    Where is a number of the program and one of each element, added to a pointer in that order: what an element adds is
    then part of the instruction that loads it, and no load waits for an address.

    A tile is of one plane, program_id(2), of ``plane`` elements: a channel, or one of PER_CHANNEL images of it; PER_CHANNEL is 0
    where the sample is one plane, whose elements' channels are worked out one by one.
    """
    element = tl.arange(0, BLOCK)
    begin = tl.program_id(1) * BLOCK
    start = tl.program_id(2) * plane + begin
    step = start + element
    if PER_CHANNEL:
        channel = tl.program_id(2) // PER_CHANNEL
        pixel = (tl.program_id(2) % PER_CHANNEL) * plane + begin + element
    elif OUT_LAST:
        channel, pixel = step % CHANNELS, step // CHANNELS
    else:
        channel = divide(step, by_channel)
        pixel = step - channel * channel_size
    if X_LAST == OUT_LAST:
        source_start, source = start, element
    elif X_LAST:
        source_start, source = start * 0, pixel * CHANNELS + channel
    else:
        source_start, source = start * 0, channel * channel_size + pixel
    return start, element, source_start, source, channel, pixel, element < plane - begin


@triton.jit
def narrowed(values, DTYPE: tl.constexpr):
    """Values as the output's. float64 becomes a 16-bit number by way of float32, as in PyTorch; Triton's interpreter makes
    others of it than its compiler."""
    if values.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        return values.to(tl.float32).to(DTYPE)
    else:
        return values.to(DTYPE)


@triton.jit
def affine(values, scale, shift, channel, mask, PER_CHANNEL: tl.constexpr):
    if scale is None:
        return values
    elif PER_CHANNEL:
        return values * tl.load(scale + channel) + tl.load(shift + channel)
    else:
        return values * tl.load(scale + channel, mask=mask, other=0.0) + tl.load(shift + channel, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["n", *SIZES])
def mix_rows(
    out, x, partner, rows, lam, scale, shift, box,
    n, batch, plane, out_stride, x_stride, channel_size, height, width, by_channel, by_height, by_width,
    PACK: tl.constexpr, OUT_PACK: tl.constexpr, X_PACK: tl.constexpr, CHANNELS: tl.constexpr, PER_CHANNEL: tl.constexpr,
    LAM_STRIDE: tl.constexpr, VEC: tl.constexpr, WRAPS: tl.constexpr,
    X_LAST: tl.constexpr, OUT_LAST: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (n, tiles, planes): one tile of one sample of the output each. ``plane`` and strides are in packs."""
    plane, out_stride, x_stride = plane * PACK, out_stride.to(tl.int64) * OUT_PACK, x_stride.to(tl.int64) * X_PACK
    i = tl.program_id(0)
    own_row = i.to(tl.int64)
    if rows is not None:
        own_row = tl.load(rows + i)
    other_row = batch - 1 - own_row if partner is None else tl.load(partner + i)
    readable = (own_row >= 0) & (own_row < batch) & (other_row >= 0) & (other_row < batch)
    weight = weight_of(lam, i, LAM_STRIDE, readable, ACC)
    start, element, source_start, source, channel, pixel, mask = places(
        plane, channel_size, by_channel, CHANNELS, PER_CHANNEL, X_LAST, OUT_LAST, BLOCK
    )
    FLOATING: tl.constexpr = x.dtype.element_ty.is_floating()  # a product of 0 and an integer is 0
    if box is None:
        # Read or not for a whole tile: masks that change from element to element would make loads narrow.
        own_read, other_read = readable & (weight != 0), readable & (1 - weight != 0)
        own = load_samples(x + (own_row * x_stride + source_start), source, mask & own_read, ACC)
        other = load_samples(x + (other_row * x_stride + source_start), source, mask & other_read, ACC)
        mixed = blend(own, other, weight, None, False, False)
    else:
        # A weight of 0 is a box around everything. Both samples are needed in the packs that the box's sides cross, or with a weight
        # between 0 and 1.
        bits = inside_box(
            box, weight == 0, height, width, by_height, by_width, CHANNELS if OUT_LAST else 1, VEC, WRAPS,
            PER_CHANNEL != 0, BLOCK,
        )  # fmt: skip
        own_source = read_at(source, bits != (1 << VEC) - 1, VEC, X_LAST == OUT_LAST, BLOCK)
        other_source = read_at(source, tl.where(weight != 1, 1, bits) != 0, VEC, X_LAST == OUT_LAST, BLOCK)
        own = load_samples(x + (own_row * x_stride + source_start), own_source, mask & readable, ACC)
        other = load_samples(x + (other_row * x_stride + source_start), other_source, mask & readable, ACC)
        mixed = blend(own, other, weight, own_bit(bits, out, VEC, BLOCK), False, FLOATING)
    mixed = affine(mixed, scale, shift, channel, mask, PER_CHANNEL)
    tl.store(out + (i.to(tl.int64) * out_stride + start) + element, narrowed(mixed, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def mix_pairs(
    out, x, lam, scale, shift, box,
    batch, plane, out_stride, x_stride, channel_size, height, width, by_channel, by_height, by_width,
    PACK: tl.constexpr, OUT_PACK: tl.constexpr, X_PACK: tl.constexpr, CHANNELS: tl.constexpr, PER_CHANNEL: tl.constexpr,
    LAM_STRIDE: tl.constexpr, VEC: tl.constexpr, WRAPS: tl.constexpr,
    LAST: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (⌈batch / 2⌉, tiles, planes): one tile of the samples i and batch - 1 - i, read before either is written."""
    plane, out_stride, x_stride = plane * PACK, out_stride.to(tl.int64) * OUT_PACK, x_stride.to(tl.int64) * X_PACK
    i = tl.program_id(0)
    j = batch - 1 - i
    inside = i < batch
    first_weight = weight_of(lam, i, LAM_STRIDE, inside, ACC)
    second_weight = weight_of(lam, j, LAM_STRIDE, inside, ACC)
    start, element, _, _, channel, pixel, mask = places(
        plane, channel_size, by_channel, CHANNELS, PER_CHANNEL, LAST, LAST, BLOCK
    )
    FLOATING: tl.constexpr = x.dtype.element_ty.is_floating()
    first_read, second_read, cut = inside, inside, None
    if box is None:
        first_read &= (first_weight != 0) | (1 - second_weight != 0)
        second_read &= (second_weight != 0) | (1 - first_weight != 0)
    first = load_samples(x + (i.to(tl.int64) * x_stride + start), element, mask & first_read, ACC)
    second = load_samples(x + (j.to(tl.int64) * x_stride + start), element, mask & second_read, ACC)
    if box is not None:
        bits = inside_box(box, False, height, width, by_height, by_width, CHANNELS, VEC, WRAPS, PER_CHANNEL != 0, BLOCK)
        cut = own_bit(bits, out, VEC, BLOCK)
    mixed = blend(first, second, first_weight, cut, FLOATING, FLOATING)
    mixed = affine(mixed, scale, shift, channel, mask, PER_CHANNEL)
    tl.store(out + (i.to(tl.int64) * out_stride + start) + element, narrowed(mixed, out.dtype.element_ty), mask=mask)
    mixed = blend(second, first, second_weight, cut, FLOATING, FLOATING)
    mixed = affine(mixed, scale, shift, channel, mask, PER_CHANNEL)
    tl.store(
        out + (j.to(tl.int64) * out_stride + start) + element,
        narrowed(mixed, out.dtype.element_ty),
        mask=mask & (j != i),
    )


def is_channels_last(memory_format: torch.memory_format) -> bool:
    return memory_format in (torch.channels_last, torch.channels_last_3d)


def dense_rows(x: Tensor) -> Tensor:
    """``x``, copied only where its samples are not dense in memory, in either order of the channels."""
    memory_format = row_format(x)
    return x if x[:1].is_contiguous(memory_format=memory_format) else x.contiguous(memory_format=memory_format)


def mix_out(x: Tensor, mixing: Mixing, box: Tensor | None = None, *, out: Tensor) -> None:
    """``mix`` into ``out``, (n, ...) of any dtype, in one launch; as ``reference.mix_out``.

    ``out`` may be ``x`` itself when partner is None and rows are not chosen. Samples with a partner, row or λ out of
    range become NaN.
    """
    mixing.check(x, out.dtype)
    check_box(box, x)
    _write(x, mixing, box, out)


def _write(x: Tensor, mixing: Mixing, box: Tensor | None, out: Tensor) -> None:
    dense = dense_rows(out)
    if dense is not out:
        _write(x, mixing, box, dense)
        out.copy_(dense)
        return
    if out.numel() == 0:
        return
    x = dense_rows(x)
    partner, lam, rows, scale, shift = mixing
    n, size = out.shape[0], out[0].numel()
    x_last, out_last = is_channels_last(row_format(x)), is_channels_last(row_format(out))
    # Planes are channels, or the images of a channel: (T, H, W).
    channel = size // out.shape[1] if scale is not None or x_last or out_last else size
    unit = out.shape[1] if out_last else 1
    height, width = (1, 1) if box is None else (out.shape[-2], out.shape[-1] * unit)
    area = height * width // unit
    plane = channel if box is None else min(area, channel) if scale is not None or x_last else area
    whole = out_last or plane < SHORTEST_PLANE or (box is not None and plane != area)
    if whole:
        plane = size
    (planes, pack), (out_strides, out_pack), (x_strides, x_pack) = map(packs, (plane, out.stride(0), x.stride(0)))
    sizes = (planes, out_strides, x_strides, channel, height, width, *map(reciprocal, (channel, height, width)))
    # A box's pack is 16 bytes, or what lies together of them, and of two lines at most.
    aligned, widest = min(pack, x_pack, out_pack), 16 // min(x.element_size(), out.element_size())
    vec = min(widest, aligned, 1 << ((width + 1).bit_length() - 1))
    constants = {
        "PACK": pack,
        "OUT_PACK": out_pack,
        "X_PACK": x_pack,
        "CHANNELS": out.shape[1] if x_last or out_last else 1,
        "PER_CHANNEL": 0 if whole else max(channel // plane, 1),
        "LAM_STRIDE": lam.stride(0) if lam.dim() and lam.shape[0] > 1 else 0,
        "VEC": vec,
        "WRAPS": width % vec != 0,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
    pairs = partner is None and rows is None and x_last == out_last
    partner, rows, box = (None if index is None else index.contiguous() for index in (partner, rows, box))

    def run(tile: Tile) -> None:
        grid = ((n + 1) // 2 if pairs else n, triton.cdiv(plane, tile.block), size // plane)
        block = {**constants, "BLOCK": tile.block, **tile.launch}
        if pairs:
            mix_pairs[grid](out, x, lam, scale, shift, box, n, *sizes, **block, LAST=x_last)
        else:
            mix_rows[grid](
                out, x, partner, rows, lam, scale, shift, box, n, x.shape[0], *sizes,
                **block, X_LAST=x_last, OUT_LAST=out_last,
            )  # fmt: skip

    in_place = out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    placed = x_last != out_last or (box is not None and ((scale is not None and whole) or aligned < widest))
    family = "mix" if box is None or x_last != out_last else "mix_cut"
    if x.element_size() <= 2:
        family += "_placed" if placed else "_narrow"
    elif placed or x.dtype == torch.float64:
        family = "mix"
    launch_tiled(family, x, plane, run, repeatable=not in_place)


def mix(
    x: Tensor,
    mixing: Mixing,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    box: Tensor | None = None,
) -> Tensor:
    """The mixed batch in one launch, normalised, cast and laid out on the way; as ``reference.mix``."""
    mixing.check(x, dtype)
    check_box(box, x)
    count = x.shape[0] if mixing.rows is None else mixing.rows.shape[0]
    out = torch.empty(
        (count, *x.shape[1:]),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=memory_format or row_format(x),
    )
    _write(x, mixing, box, out)
    return out


@triton.jit(do_not_specialize=["n", "batch", "num_mixed"])
def target_rows(
    own_lam, own_partner, own_label, partner_label, labels, partner, lam, rows,
    n, batch, num_mixed,
    LAM_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (⌈n / BLOCK⌉,): the targets of BLOCK rows; λ is NaN where a row or partner is out of range."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, clean = row < n, row >= num_mixed
    own = tl.load(rows + row, mask=mask, other=0)
    readable = mask & (own >= 0) & (own < batch)
    other = batch - 1 - own if partner is None else tl.load(partner + own, mask=readable, other=-1)
    other = tl.where(clean, own, other)
    readable = readable & (other >= 0) & (other < batch)
    weight = tl.load(lam + own * LAM_STRIDE, mask=readable, other=float("nan"))
    tl.store(own_partner + row, other, mask=mask)
    tl.store(own_label + row, tl.load(labels + own, mask=readable, other=0), mask=mask)
    tl.store(partner_label + row, tl.load(labels + other, mask=readable, other=0), mask=mask)
    tl.store(own_lam + row, tl.where(clean & readable, 1.0, weight), mask=mask)


def mixed_target(
    labels: Tensor, partner: Tensor | None, lam: Tensor, rows: Tensor, num_mixed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a batch's draw comes to, row by row, in one launch; as ``reference.mixed_target``."""
    check_target(labels, partner, lam, rows, num_mixed)
    n, block = rows.shape[0], 128
    own_partner, own_label, partner_label = (torch.empty(n, dtype=torch.int64, device=rows.device) for _ in range(3))
    own_lam = torch.empty(n, dtype=lam.dtype, device=rows.device)
    if n:
        partner = None if partner is None else partner.contiguous()
        with device_of(rows):
            target_rows[(triton.cdiv(n, block),)](
                own_lam, own_partner, own_label, partner_label, labels.contiguous(), partner, lam, rows.contiguous(),
                n, labels.shape[0], num_mixed,
                LAM_STRIDE=lam.stride(0) if lam.dim() else 0, BLOCK=block, num_warps=4, num_stages=1,
            )  # fmt: skip
    return own_lam, own_partner, own_label, partner_label
