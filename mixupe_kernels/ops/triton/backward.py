"""The gradient of ce_entropy and of mixupe_loss with respect to the logits: one launch, one formula.

Each tile of the gradient depends on its own logits and a few floats of its row, so tiles are independent; the loss's
coefficients are worked out from those floats in the same launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...conventions import penalty_of
from ..arguments import (
    LossBackwardOptions,
    LossStats,
    RowGradients,
    RowOptions,
    RowStats,
    RowTarget,
    check_logits,
    check_upstream,
)
from .launch import Tile, launch_tiled
from .rows import (
    OF_CLEAN,
    OF_MIX,
    OF_PENALTY,
    PEEL_FROM,
    aligned_part,
    dense_tile,
    edge_columns,
    gradient_tile,
    label_terms,
    prepare_target,
    split_sign,
    target_tile,
    unit_columns,
    zero_where,
)

# Half an ulp of an lse up to here is at most 2^-22 of p (float32); as lse_lost_digits in csrc/row.h.
LSE_IS_EXACT_TO = tl.constexpr(8.0)


@triton.jit
def coefficient(grad, row, inside, stride, like):
    """The gradient of one of the (N,) outputs; zero where autograd has none."""
    if grad is None:
        return tl.zeros_like(like)
    else:
        return tl.load(grad + row * stride, mask=inside, other=0.0).to(like.dtype)


@triton.jit(do_not_specialize=["n", "num_mixed"])
def row_gradient(
    out, logits, target, saved, grads, upstream,
    n, num_mixed, grad_strides,
    C: tl.constexpr, STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr, IGNORE_INDEX: tl.constexpr, SIGMOID: tl.constexpr,
    DETACHED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, column groups) of ``dz``.

    ``saved`` are (H, lse). (g_ce, g_H, g_lse) come as ``grads``, (N,) each, or for the loss from ``upstream`` = (grad,
    parts) and the sign of H.
    """
    DENSE: tl.constexpr = target.labels.dtype.element_ty.is_floating()
    # Σy is known without reading a row of targets or class weights only for unweighted indices.
    SUM_TARGETS: tl.constexpr = DENSE or (LABEL_SMOOTHING != 0 and target.class_weight is not None)
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    PEEL: tl.constexpr = C >= PEEL_FROM and (C % VEC != 0 or STRIDE % VEC != 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    offset, head, body = aligned_part(row, C, STRIDE, VEC, PEEL)
    target_shift = (row.to(tl.int64) * (TARGET_STRIDE - STRIDE))[:, None]
    out_shift = (row.to(tl.int64) * (OUT_STRIDE - STRIDE))[:, None]
    first = tl.program_id(1) * SPAN

    entropy = tl.load(saved[0] + row, mask=inside, other=0.0)
    lse = tl.load(saved[1] + row, mask=inside, other=0.0)
    edge, edge_valid = edge_columns(head, body, C, VEC)
    edge_valid = edge_valid & inside[:, None]
    edge_place = (row.to(tl.int64) * STRIDE)[:, None] + edge
    if SUM_TARGETS:
        mass = tl.zeros((ROWS,), ACC)
        for start in tl.range(0, C, BLOCK, num_stages=num_stages):
            step = (start + tl.arange(0, BLOCK))[None, :]
            valid = inside[:, None] & (step < body[:, None])
            place = offset[:, None] + step + target_shift
            mass += tl.sum(dense_tile(target, place, head[:, None] + step, valid, C, LABEL_SMOOTHING, ACC), 1)
        if PEEL:
            edge_y = dense_tile(target, edge_place + target_shift, edge, edge_valid, C, LABEL_SMOOTHING, ACC)
            mass += tl.sum(edge_y, 1)
    if DENSE:
        terms = None
        kept = (row * 0 + 1).to(ACC)
    else:
        terms = label_terms(target, row, inside, C, LABEL_SMOOTHING, IGNORE_INDEX, ACC)
        kept = terms[1] + terms[4]
        mass = kept * (mass if SUM_TARGETS else LABEL_SMOOTHING) + terms[2] + terms[5]

    if upstream is None:
        g_ce = coefficient(grads[0], row, inside, grad_strides[0], lse)
        g_entropy = coefficient(grads[1], row, inside, grad_strides[1], lse)
        g_lse = coefficient(grads[2], row, inside, grad_strides[2], lse)
    else:
        entropy, slope = split_sign(entropy)
        grad = tl.load(upstream[0]).to(ACC)
        g_q = zero_where(slope == 0, grad * tl.load(upstream[1] + OF_PENALTY) * slope)
        of_clean = tl.load(upstream[1] + OF_CLEAN)
        of_ce = tl.where(
            row < num_mixed, grad * tl.load(upstream[1] + OF_MIX), zero_where(of_clean == 0, grad * of_clean)
        )
        g_ce = of_ce - g_q
        g_lse = g_q * (mass - 1) if DENSE and not SIGMOID else g_q * 0
        g_entropy = g_q * 0 if DETACHED else g_q
    # A label out of range makes its row NaN, whatever its gradient.
    g_ce = tl.where(kept == kept, g_ce, kept)
    if SIGMOID:
        g_p = g_lse
    else:
        g_p = g_ce * mass + g_lse
        # lse is rounded, under a large shift of all logits by more than p may be: Σ e^(z - lse) is what 1 became.
        if tl.max(tl.where(lse == lse, tl.abs(lse), 0.0), 0) > LSE_IS_EXACT_TO:
            total = tl.zeros((ROWS,), ACC)
            for start in tl.range(0, C, BLOCK, num_stages=1):
                step = (start + tl.arange(0, BLOCK))[None, :]
                valid = inside[:, None] & (step < body[:, None])
                z = tl.load(logits + (offset[:, None] + step), mask=valid, other=float("-inf")).to(ACC)
                total += tl.sum(tl.exp(z - lse[:, None]), 1)
            if PEEL:
                edge_z = tl.load(logits + edge_place, mask=edge_valid, other=float("-inf")).to(ACC)
                total += tl.sum(tl.exp(edge_z - lse[:, None]), 1)
            total = tl.where(inside, total, 1.0)
            g_p /= total
            g_entropy /= total
            entropy -= tl.log(total)

    if PEEL:
        edge_valid = edge_valid & (first == 0)
        edge_z = tl.load(logits + edge_place, mask=edge_valid, other=float("-inf")).to(ACC)
        edge_y = target_tile(target, terms, edge_place + target_shift, edge, edge_valid, C, LABEL_SMOOTHING, ACC)
        edge_dz = gradient_tile(edge_z, edge_y, g_ce, g_entropy, g_p, entropy, lse, SIGMOID)
        tl.store(out + (edge_place + out_shift), edge_dz.to(out.dtype.element_ty), mask=edge_valid)
    for start in tl.range(0, SPAN, BLOCK, num_stages=num_stages):
        step = (first + start + tl.arange(0, BLOCK))[None, :]
        valid = inside[:, None] & (step < body[:, None])
        place = offset[:, None] + step
        column = head[:, None] + step
        z = tl.load(logits + place, mask=valid, other=float("-inf")).to(ACC)
        y = target_tile(target, terms, place + target_shift, column, valid, C, LABEL_SMOOTHING, ACC)
        dz = gradient_tile(z, y, g_ce, g_entropy, g_p, entropy, lse, SIGMOID)
        tl.store(out + (place + out_shift), dz.to(out.dtype.element_ty), mask=valid)


def _backward(
    out: Tensor,
    logits: Tensor,
    rows: RowTarget,
    options: RowOptions,
    stats: RowStats,
    grads: RowGradients,
    loss: tuple[Tensor, Tensor, LossBackwardOptions] | None = None,
) -> None:
    """Write dz into ``out``, from ``grads`` or for a ``loss`` of (upstream gradient, parts, options)."""
    check_logits(logits)
    for arguments in (rows, options, stats, grads):
        arguments.check(logits)
    upstream, num_mixed, detached = None, 0, False
    if loss is not None:
        grad, parts, loss_options = loss
        check_upstream(grad, logits)
        loss_options.check(logits)
        upstream, num_mixed, detached = (grad, parts), loss_options.num_mixed, penalty_of(loss_options.penalty).detached
    saved = tuple(stat.contiguous() for stat in stats)
    target = prepare_target(rows, options.class_weight)
    buffer = unit_columns(out)
    logits = unit_columns(logits)
    n, columns = logits.shape
    summed = rows.is_dense() or (options.label_smoothing != 0 and target.class_weight is not None)
    family = "row_gradient_summed" if summed else "row_gradient"
    in_place = buffer.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    # One program does a whole row if it must sum the row's targets first, or might sum its logits (LSE_IS_EXACT_TO) after
    # another program wrote over them.
    whole = summed or (in_place and not options.sigmoid)

    def run(tile: Tile) -> None:
        span = triton.cdiv(columns, tile.block) * tile.block if whole else tile.block
        row_gradient[(triton.cdiv(n, tile.rows), triton.cdiv(columns, span))](
            buffer, logits, target, saved, tuple(grads), upstream, n, num_mixed,
            tuple(0 if grad is None else grad.stride(0) for grad in grads),
            C=columns, STRIDE=logits.stride(0), TARGET_STRIDE=target.labels.stride(0), OUT_STRIDE=buffer.stride(0),
            LABEL_SMOOTHING=options.label_smoothing, IGNORE_INDEX=options.ignore_index, SIGMOID=options.sigmoid,
            DETACHED=detached,
            ROWS=tile.rows, BLOCK=tile.block, SPAN=span, **tile.launch,
        )  # fmt: skip

    if n:
        launch_tiled(family, logits, columns, run, repeatable=not in_place)
    if buffer is not out:
        out.copy_(buffer)


def ce_entropy_backward(
    grads: RowGradients, logits: Tensor, stats: RowStats, target: RowTarget, options: RowOptions
) -> Tensor:
    """dz of (CE, H, lse), (N, C) in the logits' dtype; as ``reference.ce_entropy_backward``."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(out, logits, target, options, stats, grads)
    return out


def mixupe_loss_backward_out(
    grad: Tensor, logits: Tensor, target: RowTarget, stats: LossStats, options: LossBackwardOptions, *, out: Tensor
) -> None:
    """``mixupe_loss_backward`` into ``out`` (N, C), which may be the logits themselves: a tile is read, then written."""
    check_logits(logits)
    stats.check(logits)
    row_stats = RowStats(stats.signed_entropy, stats.lse)
    no_grads = RowGradients(None, None, None)
    _backward(out, logits, target, options.of_rows(), row_stats, no_grads, (grad, stats.parts, options))


def mixupe_loss_backward(
    grad: Tensor, logits: Tensor, target: RowTarget, stats: LossStats, options: LossBackwardOptions
) -> Tensor:
    """The gradient of ``grad``·loss, (N, C) in the logits' dtype; as ``reference.mixupe_loss_backward``."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    mixupe_loss_backward_out(grad, logits, target, stats, options, out=out)
    return out
