"""ce_entropy and mixupe_loss forward: one pass over the logits.

``row_stats`` reads each row once and finishes it, or, for few long rows, leaves the states of its parts to
``merge_stats``; for the loss ``loss_total`` sums the few values each program left, in a fixed order.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...conventions import accumulate_dtype
from ..arguments import LossArguments, Parts, RowOptions, RowTarget, check_logits
from .launch import Tile, halves, launch_tiled, splits_for
from .rows import (
    OF_CLEAN,
    OF_MIX,
    OF_PENALTY,
    PEEL_FROM,
    aligned_part,
    anchor_of,
    dense_tile,
    edge_columns,
    fold,
    label_terms,
    penalty_of,
    prepare_target,
    q_hat,
    quotient,
    sign_entropy,
    target_tile,
    unit_columns,
    whole,
    zero_where,
)

MERGE_ROWS = 4  # split rows are few: a program merges four of at most 512


@triton.jit
def finish_rows(
    logits, target, saved, sums, row, inside, top, total, weighted, linear, mass,
    program, programs, n, num_mixed, num_reg, threshold,
    C: tl.constexpr, STRIDE: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, IGNORE_INDEX: tl.constexpr,
    SIGMOID: tl.constexpr, PENALTY: tl.constexpr,
):  # fmt: skip
    """CE, H and lse of each row from its state; for the loss, signed H and lse, and the program's part of its six sums."""
    DENSE: tl.constexpr = target.labels.dtype.element_ty.is_floating()
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    if SIGMOID:
        entropy, lse = weighted, total
    else:
        # A row of nothing but -∞ has no softmax: it is NaN, as in torch.
        total = tl.where(total == 0, float("nan"), total)
        log_sum = tl.log(total)
        anchor = anchor_of(top)
        entropy, lse = log_sum - quotient(weighted, total), top + log_sum
    if DENSE:
        kept = (row * 0 + 1).to(ACC)
        ce = linear if SIGMOID else mass * zero_where(mass == 0, log_sum) - linear
    else:
        own, own_share, own_peak, other, other_share, other_peak = label_terms(
            target, row, inside, C, LABEL_SMOOTHING, IGNORE_INDEX, ACC
        )
        kept = own_share + other_share
        if SIGMOID:
            ce = tl.where(kept == kept, linear, kept)
        else:
            start = row.to(tl.int64) * STRIDE
            own_z = tl.load(logits + start + own, mask=own >= 0, other=0.0).to(ACC)
            other_z = tl.load(logits + start + other, mask=other >= 0, other=0.0).to(ACC)
            # log_sum - (z - top), never lse - z: the large common part of the logits cancels first.
            ce = own_peak * zero_where(own_peak == 0, log_sum - (own_z - anchor))
            ce += other_peak * zero_where(other_peak == 0, log_sum - (other_z - anchor))
            if LABEL_SMOOTHING != 0:
                ce += kept * zero_where(kept == 0, mass * log_sum - linear)
    tl.store(saved[2] + row, lse, mask=inside)
    if sums is None:
        tl.store(saved[0] + row, ce, mask=inside)
        tl.store(saved[1] + row, entropy, mask=inside)
    else:
        q = q_hat(ce, entropy, lse, mass, DENSE, SIGMOID)
        value, slope = penalty_of(q, threshold, PENALTY)
        mixed = inside & (row < num_mixed)
        clean = inside & (row >= num_mixed)
        # NaN (a label out of range) counts as whole, so that it reaches the loss.
        counted = inside & (row >= n - num_reg) & ((kept == 1) | (kept != kept))
        tl.store(saved[1] + row, sign_entropy(entropy, tl.where(counted, slope, 0.0)), mask=inside)
        tl.store(sums + program, tl.sum(tl.where(mixed, ce, 0.0), 0))
        tl.store(sums + programs + program, tl.sum(tl.where(mixed, kept, 0.0), 0))
        tl.store(sums + 2 * programs + program, tl.sum(tl.where(clean, ce, 0.0), 0))
        tl.store(sums + 3 * programs + program, tl.sum(tl.where(clean, kept, 0.0), 0))
        tl.store(sums + 4 * programs + program, tl.sum(tl.where(counted, value, 0.0), 0))
        tl.store(sums + 5 * programs + program, tl.sum(tl.where(counted, 1.0, 0.0).to(ACC), 0))


@triton.jit(do_not_specialize=["n", "num_mixed", "num_reg"])
def row_stats(
    logits, target, saved, sums, states,
    n, num_mixed, num_reg, threshold,
    C: tl.constexpr, STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr, IGNORE_INDEX: tl.constexpr, SIGMOID: tl.constexpr,
    PENALTY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, splits): each program reads SPAN columns of ROWS rows. ``states`` (5, N, splits) or None."""
    DENSE: tl.constexpr = target.labels.dtype.element_ty.is_floating()
    HAS_DENSE: tl.constexpr = DENSE or LABEL_SMOOTHING != 0
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    PEEL: tl.constexpr = C >= PEEL_FROM and (C % VEC != 0 or STRIDE % VEC != 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    offset, head, body = aligned_part(row, C, STRIDE, VEC, PEEL)
    target_shift = row.to(tl.int64) * (TARGET_STRIDE - STRIDE)
    first = tl.program_id(1) * SPAN
    terms = None
    if SIGMOID and not DENSE:
        terms = label_terms(target, row, inside, C, LABEL_SMOOTHING, IGNORE_INDEX, ACC)

    top = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    weighted = tl.zeros((ROWS,), ACC)
    linear = tl.zeros((ROWS,), ACC)
    mass = tl.zeros((ROWS,), ACC)
    for start in tl.range(0, SPAN, BLOCK, num_stages=num_stages):
        step = (first + start + tl.arange(0, BLOCK))[None, :]
        valid = inside[:, None] & (step < body[:, None])
        place = offset[:, None] + step
        z = tl.load(logits + place, mask=valid, other=float("-inf")).to(ACC)
        y = z
        column, y_place = head[:, None] + step, place + target_shift[:, None]
        if SIGMOID:
            y = target_tile(target, terms, y_place, column, valid, C, LABEL_SMOOTHING, ACC)
        elif HAS_DENSE:
            y = dense_tile(target, y_place, column, valid, C, LABEL_SMOOTHING, ACC)
        top, total, weighted, linear, mass = fold(top, total, weighted, linear, mass, z, y, HAS_DENSE, SIGMOID)
    if PEEL:
        column, valid = edge_columns(head, body, C, VEC)
        valid = valid & inside[:, None] & (first == 0)
        place = (row.to(tl.int64) * STRIDE)[:, None] + column
        z = tl.load(logits + place, mask=valid, other=float("-inf")).to(ACC)
        y = z
        y_place = place + target_shift[:, None]
        if SIGMOID:
            y = target_tile(target, terms, y_place, column, valid, C, LABEL_SMOOTHING, ACC)
        elif HAS_DENSE:
            y = dense_tile(target, y_place, column, valid, C, LABEL_SMOOTHING, ACC)
        top, total, weighted, linear, mass = fold(top, total, weighted, linear, mass, z, y, HAS_DENSE, SIGMOID)

    if states is None:
        finish_rows(
            logits, target, saved, sums, row, inside, top, total, weighted, linear, mass,
            tl.program_id(0), tl.num_programs(0), n, num_mixed, num_reg, threshold,
            C, STRIDE, LABEL_SMOOTHING, IGNORE_INDEX, SIGMOID, PENALTY,
        )  # fmt: skip
    else:
        plane = n * tl.num_programs(1)
        state = states + row * tl.num_programs(1) + tl.program_id(1)
        tl.store(state, top, mask=inside)
        tl.store(state + plane, total, mask=inside)
        tl.store(state + 2 * plane, weighted, mask=inside)
        if HAS_DENSE or SIGMOID:
            tl.store(state + 3 * plane, linear, mask=inside)
            tl.store(state + 4 * plane, mass, mask=inside)


@triton.jit(do_not_specialize=["n", "num_mixed", "num_reg"])
def merge_stats(
    logits, target, saved, sums, states,
    n, num_mixed, num_reg, threshold,
    C: tl.constexpr, STRIDE: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr, IGNORE_INDEX: tl.constexpr, SIGMOID: tl.constexpr,
    PENALTY: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The second stage of split rows: the states of a row's parts brought to one maximum and added, in one order."""
    HAS_DENSE: tl.constexpr = target.labels.dtype.element_ty.is_floating() or LABEL_SMOOTHING != 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    plane = n * SPLITS
    state = states + row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    mask = inside[:, None]
    part_top = tl.load(state, mask=mask, other=0.0)
    part_total = tl.load(state + plane, mask=mask, other=0.0)
    part_weighted = tl.load(state + 2 * plane, mask=mask, other=0.0)
    top = tl.max(part_top, 1)
    linear = tl.zeros((ROWS,), states.dtype.element_ty)
    mass = tl.zeros((ROWS,), states.dtype.element_ty)
    if SIGMOID:
        total = tl.sum(part_total, 1)
        weighted = tl.sum(part_weighted, 1)
    else:
        anchor = anchor_of(top)[:, None]
        decay = tl.exp(part_top - anchor)
        move = anchor_of(part_top) - anchor
        total = tl.sum(decay * part_total, 1)
        weighted = tl.sum(decay * (part_weighted + move * part_total), 1)
    if HAS_DENSE or SIGMOID:
        part_linear = tl.load(state + 3 * plane, mask=mask, other=0.0)
        part_mass = tl.load(state + 4 * plane, mask=mask, other=0.0)
        mass = tl.sum(part_mass, 1)
        linear = tl.sum(part_linear, 1) if SIGMOID else tl.sum(part_linear + move * part_mass, 1)
    finish_rows(
        logits, target, saved, sums, row, inside, top, total, weighted, linear, mass,
        tl.program_id(0), tl.num_programs(0), n, num_mixed, num_reg, threshold,
        C, STRIDE, LABEL_SMOOTHING, IGNORE_INDEX, SIGMOID, PENALTY,
    )  # fmt: skip


@triton.jit
def one_over(count):
    """1 / count, 0 for a count of 0."""
    return tl.where(count > 0, quotient(count * 0 + 1, tl.where(count > 0, count, 1.0)), 0.0)


@triton.jit(do_not_specialize=["programs"])
def loss_total(
    loss, parts, sums, eta, reg_weight,
    programs, clean_weight,
    HAS_CLEAN: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """L and its ``Parts`` from the sums of every program; one program, so that the order is fixed."""
    ce = tl.zeros((BLOCK,), sums.dtype.element_ty)
    rows_mix = tl.zeros((BLOCK,), sums.dtype.element_ty)
    clean = tl.zeros((BLOCK,), sums.dtype.element_ty)
    rows_clean = tl.zeros((BLOCK,), sums.dtype.element_ty)
    value = tl.zeros((BLOCK,), sums.dtype.element_ty)
    rows_reg = tl.zeros((BLOCK,), sums.dtype.element_ty)
    start = 0  # and while: as in sums.gather_rows
    while start < programs:
        program = start + tl.arange(0, BLOCK)
        mask = program < programs
        ce += tl.load(sums + program, mask=mask, other=0.0)
        rows_mix += tl.load(sums + programs + program, mask=mask, other=0.0)
        clean += tl.load(sums + 2 * programs + program, mask=mask, other=0.0)
        rows_clean += tl.load(sums + 3 * programs + program, mask=mask, other=0.0)
        value += tl.load(sums + 4 * programs + program, mask=mask, other=0.0)
        rows_reg += tl.load(sums + 5 * programs + program, mask=mask, other=0.0)
        start += BLOCK
    rows_mix = tl.sum(rows_mix, 0)
    per_mix = one_over(rows_mix)
    per_clean = one_over(tl.sum(rows_clean, 0))
    per_reg = one_over(tl.sum(rows_reg, 0)) * tl.load(reg_weight)
    strength = tl.load(eta)
    mix_loss = tl.sum(ce, 0) * per_mix
    clean_loss = tl.sum(clean, 0) * per_clean
    reg = tl.sum(value, 0) * per_reg
    cross_entropy = mix_loss
    if HAS_CLEAN:  # 0·∞ is NaN
        cross_entropy += clean_loss * whole(clean_weight, clean_loss)
    total = cross_entropy + strength * reg
    eta_hat = rows_mix * 0 + 1
    if RESCALE:
        eta_hat = tl.where(total == 0, 1.0, quotient(tl.abs(cross_entropy), tl.where(total == 0, 1.0, tl.abs(total))))
    of_clean = per_clean * 0
    if HAS_CLEAN:
        of_clean = eta_hat * per_clean * whole(clean_weight, per_clean)
    tl.store(loss, eta_hat * total)
    tl.store(parts, mix_loss)
    tl.store(parts + 1, clean_loss)
    tl.store(parts + 2, reg)
    tl.store(parts + 3, eta_hat)
    tl.store(parts + OF_MIX, eta_hat * per_mix)
    tl.store(parts + OF_CLEAN, of_clean)
    tl.store(parts + OF_PENALTY, eta_hat * strength * per_reg)


def _forward(
    logits: Tensor, rows: RowTarget, options: RowOptions, loss: LossArguments | None = None
) -> tuple[Any, ...]:
    """(CE, H, lse), or for a ``loss`` the loss, its parts, signed H and lse."""
    check_logits(logits)
    for arguments in (rows, options) if loss is None else (rows, options, loss):
        arguments.check(logits)
    target = prepare_target(rows, options.class_weight)
    logits = unit_columns(logits)
    n, columns = logits.shape
    new = functools.partial(torch.empty, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    saved = (None if loss else new(n), new(n), new(n))
    total, parts = new(()), new(len(Parts._fields))
    num_mixed, num_reg = (loss.num_mixed, loss.num_reg) if loss else (0, 0)
    threshold = halves(loss.threshold if loss else 1.0)
    shape = {"C": columns, "STRIDE": logits.stride(0)}
    flags = {
        "LABEL_SMOOTHING": options.label_smoothing,
        "IGNORE_INDEX": options.ignore_index,
        "SIGMOID": options.sigmoid,
        "PENALTY": loss.penalty if loss else 0,
    }

    def run(tile: Tile) -> None:
        splits = splits_for(n, columns, tile.block)
        span = triton.cdiv(triton.cdiv(columns, tile.block), splits) * tile.block
        groups = triton.cdiv(n, MERGE_ROWS if splits > 1 else tile.rows)
        sums = new((6, groups)) if loss else None
        states = new((5, n, splits)) if splits > 1 else None
        if n:
            row_stats[(triton.cdiv(n, tile.rows), splits)](
                logits, target, saved, sums, states, n, num_mixed, num_reg, threshold,
                **shape, TARGET_STRIDE=target.labels.stride(0), **flags,
                ROWS=tile.rows, BLOCK=tile.block, SPAN=span, **tile.launch,
            )  # fmt: skip
        if n and splits > 1:
            merge_stats[(groups,)](
                logits, target, saved, sums, states, n, num_mixed, num_reg, threshold,
                **shape, **flags, ROWS=MERGE_ROWS, SPLITS=splits, num_warps=1, num_stages=1,
            )  # fmt: skip
        if loss:
            loss_total[(1,)](
                total, parts, sums, loss.eta, loss.reg_weight, groups, halves(loss.clean_weight),
                HAS_CLEAN=loss.clean_weight != 0, RESCALE=loss.rescale, BLOCK=1024, num_warps=4, num_stages=1,
            )  # fmt: skip

    launch_tiled("row_stats_dense" if target.labels.dim() == 2 else "row_stats", logits, columns, run)
    return (total, parts, *saved[1:]) if loss else saved


def ce_entropy(logits: Tensor, target: RowTarget, options: RowOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, H, lse) of each row in one launch, or two where few long rows are split; as ``reference.ce_entropy``."""
    return _forward(logits, target, options)


def mixupe_loss(logits: Tensor, target: RowTarget, arguments: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, parts, signed H, lse) in two launches, or three where few long rows are split; as the reference's."""
    return _forward(logits, target, arguments.of_rows(), arguments)
