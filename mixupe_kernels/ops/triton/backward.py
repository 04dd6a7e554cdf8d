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
from .launch import Tile, launch_tiled, splits_for, tile_shape
from .rows import (
    LOG_2,
    OF_CLEAN,
    OF_MIX,
    OF_PENALTY,
    aligned_part,
    dense_tile,
    edge_columns,
    exponent,
    gradient_of,
    label_terms,
    load_tile,
    of_rows,
    prepare_smoothing,
    prepare_target,
    split_sign,
    spread_tile,
    steps,
    sum_of_lanes,
    unit_columns,
    whole,
    zero_where,
)

# lse up to here, rounded, is exact enough: lse_is_exact_to in csrc/row.h says why. 16 bits are the dtype of logits and gradient.
LSE_IS_EXACT_TO, LSE_IS_EXACT_TO_16_BITS = tl.constexpr(8.0), tl.constexpr(32.0)


@triton.jit
def coefficient(grad, row, inside, stride, like):
    """The gradient of one of the (N,) outputs; zero where autograd has none."""
    if grad is None:
        return tl.zeros_like(like)
    else:
        return tl.load(grad + row * stride, mask=inside, other=0.0).to(like.dtype)


@triton.jit
def is_written(label, head, body, first, SPAN: tl.constexpr, PEEL: tl.constexpr):
    """Whether a label's column is one of this program's: of its SPAN columns, or an edge, which the first program writes."""
    least = tl.where(first == 0, 0, head + first)
    most = tl.where(first + SPAN >= body, head + body, head + first + SPAN)
    written = (label >= least) & (label < most)
    if PEEL:
        written = written | ((first == 0) & (label >= head + body))
    return written


@triton.jit
def label_columns(
    out, logits, target, smoothing, terms, label, z, row, mask, target_start, out_start,
    g_ce, level, slope, lse,
    C: tl.constexpr, ACC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """dz of one label of each row, written over what the row's tiles left there."""
    own, own_share, own_peak, other, other_share, other_peak = terms
    y = tl.where(label == own, own_peak, 0.0) + tl.where(label == other, other_peak, 0.0)
    if smoothing is not None:
        y += dense_tile(target, smoothing, target_start + label, label, mask, C, ACC) * (own_share + other_share)
    # Label terms meet the rest in the accumulation dtype, before the one store: read back and corrected in bfloat16, a gradient
    # whose p rounds to 1 would be lost altogether.
    dz = gradient_of(z, g_ce, level, slope, lse, SIGMOID) - g_ce * y
    tl.store(out + (out_start + label), dz.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "num_mixed"])
def row_gradient(
    out, logits, target, smoothing, saved, grads, upstream,
    n, num_mixed, grad_strides,
    C: tl.constexpr, STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr, SIGMOID: tl.constexpr, DETACHED: tl.constexpr, IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr, PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPAN: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, splits) of ``dz``: each program writes SPAN columns of ROWS rows.

    ``saved`` are (H, lse). (g_ce, g_H, g_lse) come as ``grads``, (N,) each, or for the loss from ``upstream`` = (grad,
    parts) and the sign of H.
    """
    DENSE: tl.constexpr = target.labels.dtype.element_ty.is_floating()
    HAS_DENSE: tl.constexpr = DENSE or smoothing is not None
    # Σy is known without reading a row of targets or class weights only for unweighted indices.
    SUM_TARGETS: tl.constexpr = DENSE or (smoothing is not None and target.class_weight is not None)
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT_TO: tl.constexpr = (
        LSE_IS_EXACT_TO_16_BITS if out.dtype.element_ty.primitive_bitwidth == 16 else LSE_IS_EXACT_TO
    )
    # Packs at a time where lse lost digits: seldom in 16 bits, often in float32, where the code must stay short but not slow.
    AGAIN: tl.constexpr = 1 if out.dtype.element_ty.primitive_bitwidth == 16 else max(PACKS // 2, 1)
    PEEL: tl.constexpr = VEC > 1 and (C % VEC != 0 or STRIDE % VEC != 0)
    BLOCK: tl.constexpr = PACKS * LANES * VEC
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    offset, head, body = aligned_part(row, C, STRIDE, VEC, PEEL)
    start_of_row = row.to(tl.int64) * STRIDE
    target_shift = row.to(tl.int64) * (TARGET_STRIDE - STRIDE)
    out_shift = row.to(tl.int64) * (OUT_STRIDE - STRIDE)
    first = tl.program_id(1) * SPAN

    entropy = tl.load(saved[0] + row, mask=inside, other=0.0)
    lse = tl.load(saved[1] + row, mask=inside, other=0.0)
    edge, edge_valid = edge_columns(head, body, C, LANES, VEC)
    edge_valid = edge_valid & of_rows(inside)
    edge_place = of_rows(start_of_row) + edge
    terms = label_terms(target, smoothing, row, inside, C, IGNORE_INDEX, ACC)
    kept = terms[1] + terms[4]
    if SUM_TARGETS:
        masses = tl.zeros((ROWS, LANES), ACC)
        step = steps(PACKS, LANES, VEC)
        for start in tl.range(0, C, BLOCK, num_stages=num_stages):
            valid = of_rows(inside) & (step < of_rows(body - start))
            place, column = of_rows(offset * VEC + target_shift + start) + step, of_rows(head + start) + step
            masses += sum_of_lanes(dense_tile(target, smoothing, place, column, valid, C, ACC))
        if PEEL:
            edge_y_place = edge_place + of_rows(target_shift)
            masses += sum_of_lanes(dense_tile(target, smoothing, edge_y_place, edge, edge_valid, C, ACC))
        mass = tl.sum(masses, 1)
    elif smoothing is not None:
        mass = whole(smoothing.whole, lse)
    else:
        mass = tl.zeros_like(kept)
    mass = zero_where(mass == 0, kept * mass) + terms[2] + terms[5]

    if upstream is None:
        g_ce = coefficient(grads[0], row, inside, grad_strides[0], lse)
        g_entropy = coefficient(grads[1], row, inside, grad_strides[1], lse)
        g_lse = coefficient(grads[2], row, inside, grad_strides[2], lse)
    else:
        entropy, sign = split_sign(entropy)
        grad = tl.load(upstream[0]).to(ACC)
        g_q = zero_where(sign == 0, grad * tl.load(upstream[1] + OF_PENALTY) * sign)
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
        level, slope = g_lse, g_entropy
    else:
        level = g_ce * mass + g_lse - zero_where(g_entropy == 0, g_entropy * entropy)
        # lse is rounded, under a large shift of all logits by more than p may be: Σ e^(z - lse) is what 1 became.
        if tl.max(tl.where(lse == lse, tl.abs(lse), 0.0), 0) > EXACT_TO:
            totals = tl.zeros((ROWS, LANES), ACC)
            at, left = logits + offset * VEC, tl.where(inside, body // VEC, 0)
            for _ in tl.range(0, C, AGAIN * LANES * VEC, num_stages=1):
                z = load_tile(at, left, AGAIN, LANES, VEC, ACC, not HAS_DENSE)
                totals += sum_of_lanes(tl.exp2(exponent(z - of_rows(lse))))
                at += AGAIN * LANES * VEC
                left -= AGAIN * LANES
            if PEEL:
                edge_z = tl.load(logits + edge_place, mask=edge_valid, other=float("-inf")).to(ACC)
                totals += sum_of_lanes(tl.exp2(exponent(edge_z - of_rows(lse))))
            total = tl.where(inside, tl.sum(totals, 1), 1.0)
            scale = 1 / total
            level = (level + g_entropy * tl.log(total)) * scale
            g_entropy *= scale
        slope = g_entropy * LOG_2

    own_z, other_z = lse, lse
    if not DENSE:
        own_z = tl.load(logits + (start_of_row + terms[0]), mask=terms[0] >= 0, other=0.0).to(ACC)
        other_z = tl.load(logits + (start_of_row + terms[3]), mask=terms[3] >= 0, other=0.0).to(ACC)
        if IN_PLACE:
            tl.debug_barrier()  # before other threads write there

    of_tile = (of_rows(g_ce), of_rows(level), of_rows(slope), of_rows(lse))
    if PEEL:
        edge_valid = edge_valid & (first == 0)
        edge_z = tl.load(logits + edge_place, mask=edge_valid, other=float("-inf")).to(ACC)
        edge_dz = gradient_of(edge_z, of_tile[0], of_tile[1], of_tile[2], of_tile[3], SIGMOID)
        if HAS_DENSE:
            edge_dz -= of_tile[0] * spread_tile(
                target, smoothing, terms, edge_place + of_rows(target_shift), edge, edge_valid, C, ACC
            )
        tl.store(out + (edge_place + of_rows(out_shift)), edge_dz.to(out.dtype.element_ty), mask=edge_valid)
    step = steps(PACKS, LANES, VEC)
    # As in row_stats.
    at, left = logits + (offset * VEC + first), tl.where(inside, (body - first) // VEC, 0)
    to = out + (offset * VEC + out_shift + first)
    for start in tl.range(0, SPAN, BLOCK, num_stages=num_stages):
        z = load_tile(at, left, PACKS, LANES, VEC, ACC, not HAS_DENSE)
        dz = gradient_of(z, of_tile[0], of_tile[1], of_tile[2], of_tile[3], SIGMOID)
        valid = step < of_rows(left * VEC)
        if HAS_DENSE:
            column = of_rows(head + (first + start)) + step
            place = of_rows(offset * VEC + target_shift + (first + start)) + step
            dz -= of_tile[0] * spread_tile(target, smoothing, terms, place, column, valid, C, ACC)
        tl.store(of_rows(to) + step, dz.to(out.dtype.element_ty), mask=valid)
        at += BLOCK
        left -= BLOCK // VEC
        to += BLOCK

    if not DENSE:
        tl.debug_barrier()  # after other threads wrote there
        label_columns(
            out, logits, target, smoothing, terms, terms[0], own_z, row,
            inside & is_written(terms[0], head, body, first, SPAN, PEEL),
            start_of_row + target_shift, start_of_row + out_shift, g_ce, level, slope, lse, C, ACC, SIGMOID,
        )  # fmt: skip
        if target.partner_labels is not None:
            label_columns(
                out, logits, target, smoothing, terms, terms[3], other_z, row,
                inside & is_written(terms[3], head, body, first, SPAN, PEEL),
                start_of_row + target_shift, start_of_row + out_shift, g_ce, level, slope, lse, C, ACC, SIGMOID,
            )  # fmt: skip


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
    smoothing = prepare_smoothing(options.label_smoothing, columns)
    summed = rows.is_dense() or (options.label_smoothing != 0 and target.class_weight is not None)
    family = "row_gradient_summed" if summed else "row_gradient"
    in_place = buffer.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()

    def run(tile: Tile) -> None:
        # In place one program does a whole row: it might sum the row's logits (LSE_IS_EXACT_TO) after another wrote over them.
        splits = 1 if in_place else splits_for(n, columns, tile.block)
        span = triton.cdiv(triton.cdiv(columns, tile.block), splits) * tile.block
        row_gradient[(triton.cdiv(n, tile.rows), splits)](
            buffer, logits, target, smoothing, saved, tuple(grads), upstream, n, num_mixed,
            tuple(0 if grad is None else grad.stride(0) for grad in grads),
            C=columns, STRIDE=logits.stride(0), TARGET_STRIDE=target.labels.stride(0), OUT_STRIDE=buffer.stride(0),
            IGNORE_INDEX=options.ignore_index, SIGMOID=options.sigmoid, DETACHED=detached, IN_PLACE=in_place,
            **tile_shape(tile, logits), SPAN=span, **tile.launch,
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
