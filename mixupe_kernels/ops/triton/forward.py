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
from .launch import Tile, halves, launch_tiled, splits_for, tile_shape
from .rows import (
    LOG_2,
    OF_CLEAN,
    OF_MIX,
    OF_PENALTY,
    aligned_part,
    anchor_of,
    dense_tile,
    edge_columns,
    fold,
    join,
    label_terms,
    load_tile,
    of_rows,
    penalty_of,
    prepare_smoothing,
    prepare_target,
    q_hat,
    quotient,
    sign_entropy,
    steps,
    target_tile,
    unit_columns,
    whole,
    zero_where,
)

SUMS = tl.constexpr(
    8
)  # places for a program's six: ΣCE and shares of mixed rows, of clean ones, Σ penalties and their number
MERGE_ROWS = 4  # split rows are few: a program merges four of at most 512


@triton.jit
def finish_rows(
    logits, target, smoothing, saved, sums, row, inside, top, total, weighted, linear, mass,
    n, num_mixed, num_reg, threshold,
    C: tl.constexpr, STRIDE: tl.constexpr, IGNORE_INDEX: tl.constexpr, SIGMOID: tl.constexpr, PENALTY: tl.constexpr,
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
        entropy, lse = log_sum - weighted * LOG_2 / total, top + log_sum
    if DENSE:
        kept = (row * 0 + 1).to(ACC)
        ce = linear if SIGMOID else mass * zero_where(mass == 0, log_sum) - linear
    else:
        own, own_share, own_peak, other, other_share, other_peak = label_terms(
            target, smoothing, row, inside, C, IGNORE_INDEX, ACC
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
            if smoothing is not None:
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
        # Beside one another, so that the rows of a program are added up once.
        number = tl.arange(0, SUMS)[None, :]
        parts = tl.where(number == 0, tl.where(mixed, ce, 0.0)[:, None], tl.where(mixed, kept, 0.0)[:, None])
        parts = tl.where(number == 2, tl.where(clean, ce, 0.0)[:, None], parts)
        parts = tl.where(number == 3, tl.where(clean, kept, 0.0)[:, None], parts)
        parts = tl.where(number == 4, tl.where(counted, value, 0.0)[:, None], parts)
        parts = tl.where(number == 5, tl.where(counted, 1.0, 0.0)[:, None], parts)
        tl.store(sums + tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS), tl.sum(parts.to(ACC), 0))


@triton.jit(do_not_specialize=["n", "num_mixed", "num_reg"])
def row_stats(
    logits, target, smoothing, saved, sums, states,
    n, num_mixed, num_reg, threshold,
    C: tl.constexpr, STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr, SIGMOID: tl.constexpr, PENALTY: tl.constexpr,
    ROWS: tl.constexpr, PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPAN: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, splits): each program reads SPAN columns of ROWS rows. ``states`` (5, N, splits) or None."""
    DENSE: tl.constexpr = target.labels.dtype.element_ty.is_floating()
    HAS_DENSE: tl.constexpr = DENSE or smoothing is not None
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    PEEL: tl.constexpr = VEC > 1 and (C % VEC != 0 or STRIDE % VEC != 0)
    BLOCK: tl.constexpr = PACKS * LANES * VEC
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    offset, head, body = aligned_part(row, C, STRIDE, VEC, PEEL)
    target_shift = row.to(tl.int64) * (TARGET_STRIDE - STRIDE)
    first = tl.program_id(1) * SPAN
    terms = None
    if SIGMOID and not DENSE:
        terms = label_terms(target, smoothing, row, inside, C, IGNORE_INDEX, ACC)

    top = tl.full((ROWS, LANES), float("-inf"), ACC)
    total = tl.zeros((ROWS, LANES), ACC)
    weighted = tl.zeros((ROWS, LANES), ACC)
    linear = tl.zeros((ROWS, LANES), ACC)
    mass = tl.zeros((ROWS, LANES), ACC)
    if PEEL:
        edge, edge_valid = edge_columns(head, body, C, LANES, VEC)
        edge_valid = edge_valid & of_rows(inside) & (first == 0)
        edge_place = of_rows(row.to(tl.int64) * STRIDE) + edge
        edge_z = tl.load(logits + edge_place, mask=edge_valid, other=float("-inf")).to(ACC)
        edge_y = edge_z
        if SIGMOID:
            edge_y = target_tile(target, smoothing, terms, edge_place + of_rows(target_shift), edge, edge_valid, C, ACC)
        elif HAS_DENSE:
            edge_y = dense_tile(target, smoothing, edge_place + of_rows(target_shift), edge, edge_valid, C, ACC)
        top, total, weighted, linear, mass = fold(
            top, total, weighted, linear, mass, edge_z, edge_y, HAS_DENSE, SIGMOID
        )
    # Pointers that move, not a column that is added to them: that would be of 64 bits, and so would each mask.
    at, left = logits + (offset * VEC + first), tl.where(inside, (body - first) // VEC, 0)
    for start in tl.range(0, SPAN, BLOCK, num_stages=num_stages):
        z = load_tile(at, left, PACKS, LANES, VEC, ACC, not (HAS_DENSE or SIGMOID))
        y = z
        if HAS_DENSE or SIGMOID:
            step = steps(PACKS, LANES, VEC)
            valid, column = step < of_rows(left * VEC), of_rows(head + (first + start)) + step
            place = of_rows(offset * VEC + target_shift + (first + start)) + step
            if SIGMOID:
                y = target_tile(target, smoothing, terms, place, column, valid, C, ACC)
            else:
                y = dense_tile(target, smoothing, place, column, valid, C, ACC)
            if not DENSE:
                y = tl.where(z > float("inf"), z, y)  # nowhere: but constants beside a tile lie in its threads then
        top, total, weighted, linear, mass = fold(top, total, weighted, linear, mass, z, y, HAS_DENSE, SIGMOID)
        at += BLOCK
        left -= BLOCK // VEC

    top, total, weighted, linear, mass = join(top, total, weighted, linear, mass, HAS_DENSE, SIGMOID)
    if states is None:
        finish_rows(
            logits, target, smoothing, saved, sums, row, inside, top, total, weighted, linear, mass,
            n, num_mixed, num_reg, threshold, C, STRIDE, IGNORE_INDEX, SIGMOID, PENALTY,
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
    logits, target, smoothing, saved, sums, states,
    n, num_mixed, num_reg, threshold,
    C: tl.constexpr, STRIDE: tl.constexpr, IGNORE_INDEX: tl.constexpr, SIGMOID: tl.constexpr, PENALTY: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The second stage of split rows: the states of a row's parts brought to one maximum and added, in one order."""
    HAS_DENSE: tl.constexpr = target.labels.dtype.element_ty.is_floating() or smoothing is not None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    plane = n * SPLITS
    state = states + row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    mask = inside[:, None]
    tops = tl.load(state, mask=mask, other=0.0)
    totals = tl.load(state + plane, mask=mask, other=0.0)
    weighteds = tl.load(state + 2 * plane, mask=mask, other=0.0)
    linears, masses = totals, totals
    if HAS_DENSE or SIGMOID:
        linears = tl.load(state + 3 * plane, mask=mask, other=0.0)
        masses = tl.load(state + 4 * plane, mask=mask, other=0.0)
    top, total, weighted, linear, mass = join(tops, totals, weighteds, linears, masses, HAS_DENSE, SIGMOID)
    finish_rows(
        logits, target, smoothing, saved, sums, row, inside, top, total, weighted, linear, mass,
        n, num_mixed, num_reg, threshold, C, STRIDE, IGNORE_INDEX, SIGMOID, PENALTY,
    )  # fmt: skip


@triton.jit
def one_over(count):
    """1 / count, 0 for a count of 0."""
    return tl.where(count > 0, quotient(count * 0 + 1, tl.where(count > 0, count, 1.0)), 0.0)


@triton.jit
def part_of(added, number, which: tl.constexpr):
    return tl.sum(tl.sum(tl.where(number == which, added, 0.0), 1), 0)


@triton.jit(do_not_specialize=["programs"])
def loss_total(
    loss, parts, sums, eta, reg_weight,
    programs, clean_weight,
    HAS_CLEAN: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """L and its ``Parts`` from the (programs, SUMS) of ``finish_rows``; one program, so that the order is fixed."""
    number = tl.arange(0, SUMS)[None, :]
    added = tl.zeros((BLOCK, SUMS), sums.dtype.element_ty)
    start = 0  # and while: as in sums.gather_rows
    while start < programs:
        program = (start + tl.arange(0, BLOCK))[:, None]
        added += tl.load(sums + program * SUMS + number, mask=program < programs, other=0.0)
        start += BLOCK
    added = tl.sum(added, 0)[None, :]
    rows_mix = part_of(added, number, 1)
    per_mix = one_over(rows_mix)
    per_clean = one_over(part_of(added, number, 3))
    per_reg = one_over(part_of(added, number, 5)) * tl.load(reg_weight)
    strength = tl.load(eta)
    mix_loss = part_of(added, number, 0) * per_mix
    clean_loss = part_of(added, number, 2) * per_clean
    reg = part_of(added, number, 4) * per_reg
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
    smoothing = prepare_smoothing(options.label_smoothing, columns)
    flags = {
        "IGNORE_INDEX": options.ignore_index,
        "SIGMOID": options.sigmoid,
        "PENALTY": loss.penalty if loss else 0,
    }

    def run(tile: Tile) -> None:
        splits = splits_for(n, columns, tile.block)
        span = triton.cdiv(triton.cdiv(columns, tile.block), splits) * tile.block
        groups = triton.cdiv(n, MERGE_ROWS if splits > 1 else tile.rows)
        sums = new((groups, SUMS.value)) if loss else None
        states = new((5, n, splits)) if splits > 1 else None
        if n:
            row_stats[(triton.cdiv(n, tile.rows), splits)](
                logits, target, smoothing, saved, sums, states, n, num_mixed, num_reg, threshold,
                **shape, TARGET_STRIDE=target.labels.stride(0), **flags,
                **tile_shape(tile, logits), SPAN=span, **tile.launch,
            )  # fmt: skip
        if n and splits > 1:
            merge_stats[(groups,)](
                logits, target, smoothing, saved, sums, states, n, num_mixed, num_reg, threshold,
                **shape, **flags, ROWS=MERGE_ROWS, SPLITS=splits, num_warps=1, num_stages=1,
            )  # fmt: skip
        if loss:
            loss_total[(1,)](
                total, parts, sums, loss.eta, loss.reg_weight, groups, halves(loss.clean_weight),
                HAS_CLEAN=loss.clean_weight != 0, RESCALE=loss.rescale, BLOCK=1024, num_warps=8, num_stages=1,
            )  # fmt: skip

    launch_tiled("row_stats_dense" if target.labels.dim() == 2 else "row_stats", logits, columns, run)
    return (total, parts, *saved[1:]) if loss else saved


def ce_entropy(logits: Tensor, target: RowTarget, options: RowOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, H, lse) of each row in one launch, or two where few long rows are split; as ``reference.ce_entropy``."""
    return _forward(logits, target, options)


def mixupe_loss(logits: Tensor, target: RowTarget, arguments: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, parts, signed H, lse) in two launches, or three where few long rows are split; as the reference's."""
    return _forward(logits, target, arguments.of_rows(), arguments)
