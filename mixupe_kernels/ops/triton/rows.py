"""Device functions of one row of logits: where its columns lie, its targets, its running state and its gradient.

All of them work on tiles of several rows, (PACKS, ROWS, LANES, VEC): a thread of a lane holds PACKS packs of VEC neighbouring
columns, one 16-byte load each, so that the reductions within a lane are a thread's own and no barrier or shuffle stands
in a loop. Invalid columns hold a logit of -∞ and a target of 0, which add 0 to every sum.
"""

import math
import os
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Parts, RowTarget
from .launch import halves


class Target(NamedTuple):
    """The targets of N rows: dense (N, C), or class indices (N,), mixed where there is a partner. None compiles away."""

    labels: Tensor
    partner_labels: Tensor | None
    lam: Tensor | None
    class_weight: Tensor | None


OF_MIX, OF_CLEAN, OF_PENALTY = (
    tl.constexpr(Parts._fields.index(name)) for name in ("of_mix", "of_clean", "of_penalty")
)
LOG2_E, LOG_2 = tl.constexpr(1 / math.log(2)), tl.constexpr(math.log(2))
# Under this exponent of 2 a term of a sum is 0: -∞ is brought to it, as 0·∞ is NaN.
LEAST_EXPONENT = tl.constexpr(-2000.0)


# The interpreter's maximum warns of lanes of nothing but NaN, which a GPU's leaves out.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Smoothing(NamedTuple):
    """Label smoothing ε of C classes as arguments of a kernel, ``launch.halves`` each: 1 - ε, ε / C and ε. None is no smoothing."""

    kept: tuple[float, float]
    uniform: tuple[float, float]
    whole: tuple[float, float]


def prepare_smoothing(label_smoothing: float, columns: int) -> Smoothing | None:
    if label_smoothing == 0:
        return None
    return Smoothing(halves(1 - label_smoothing), halves(label_smoothing / columns), halves(label_smoothing))


def unit_columns(rows: Tensor) -> Tensor:
    """``rows`` (N, C), copied only where neighbouring columns are not neighbours in memory."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def prepare_target(target: RowTarget, class_weight: Tensor | None) -> Target:
    """The arguments of the operators as the kernels take them, copied only where their strides demand it."""
    if target.is_dense():
        return Target(unit_columns(target.labels), None, None, class_weight)
    return Target(*target.map(Tensor.contiguous), class_weight)


# Columns. A row that does not start at a multiple of 16 bytes (C = 21841) is read as an aligned body and up to
# VEC - 1 edge columns on either side of it, for a masked or unaligned vector access falls apart into single ones.
# https://github.com/triton-lang/triton/blob/main/lib/Analysis/AxisInfo.cpp


@triton.jit
def aligned_part(row, C: tl.constexpr, STRIDE: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr):
    """(offset, head, body): each row's aligned part, ``offset`` packs into memory and ``head`` columns into it, of ``body`` columns."""
    if PEEL:
        start = row.to(tl.int64) * STRIDE
        offset = (start + (VEC - 1)) // VEC
        head = (offset * VEC - start).to(tl.int32)
        body = (C - head) // VEC * VEC
    else:
        offset = row.to(tl.int64) * (STRIDE // VEC)
        head = row * 0
        body = head + C
    return offset, head, body


@triton.jit
def of_rows(values):
    """Values of rows, (ROWS,), beside a tile."""
    return values[None, :, None, None]


@triton.jit
def of_lanes(values):
    """Values of lanes, (ROWS, LANES), beside a tile."""
    return values[None, :, :, None]


@triton.jit
def sum_of_lanes(values):
    """(ROWS, LANES) sums of a tile's columns."""
    return tl.sum(tl.sum(values, 3), 0)


@triton.jit
def steps(PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """The columns of a tile from its first on."""
    lane = tl.arange(0, LANES)[None, None, :, None] * VEC + tl.arange(0, VEC)[None, None, None, :]
    # The packs' constants come last, where the compiler finds them: each is part of a load's instruction then.
    return lane + tl.arange(0, PACKS)[:, None, None, None] * (LANES * VEC)


@triton.jit
def load_tile(
    at, left, PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, ALONE: tl.constexpr
):
    """A tile of logits: of each row those that ``at`` (ROWS,) points to, as far as there are packs ``left`` (ROWS,).

    bfloat16 are read in pairs, of which either half is a float32 but for its low bits: one instruction a logit. Not so
    beside tiles of targets, which lie in threads otherwise: they are ``ALONE``, or one of the two crosses shared memory.
    """
    if ALONE and at.dtype.element_ty == tl.bfloat16 and VEC > 1:
        HALF: tl.constexpr = VEC // 2
        step = steps(PACKS, LANES, HALF)
        pairs = of_rows(at.to(tl.pointer_type(tl.int32), bitcast=True)) + step
        pair = tl.load(pairs, mask=step < of_rows(left * HALF), other=-0x7F0080)  # -∞ twice
        low, high = (pair << 16).to(tl.float32, bitcast=True), (pair & -0x10000).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), (PACKS, left.shape[0], LANES, VEC))
    else:
        step = steps(PACKS, LANES, VEC)
        return tl.load(of_rows(at) + step, mask=step < of_rows(left * VEC), other=float("-inf")).to(ACC)


@triton.jit
def edge_columns(head, body, C: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """(columns, valid) of what lies before and after the aligned part, as a tile of one column a lane."""
    lane = tl.arange(0, LANES)[None, None, :, None]
    column = tl.where(lane < VEC, lane, of_rows(head + body) + lane - VEC)
    return column, (lane < 2 * VEC) & tl.where(lane < VEC, lane < of_rows(head), column < C)


# Targets. Of a target of class indices, `share` is how much of the row's weight a label carries (0 where ignored) and
# `peak` what its class receives beyond the smoothing. A label out of range makes its row NaN, and is not read.


@triton.jit
def label_term(
    labels, weight, class_weight, row, inside,
    smoothing, C: tl.constexpr, IGNORE_INDEX: tl.constexpr,
):  # fmt: skip
    label = tl.load(labels + row, mask=inside, other=IGNORE_INDEX)
    kept = label != IGNORE_INDEX
    readable = kept & (label >= 0) & (label < C)
    share = tl.where(kept, tl.where(readable, weight, float("nan")), 0.0)
    peak = share
    if smoothing is not None:
        peak = share * whole(smoothing.kept, share)
    if class_weight is not None:
        peak *= tl.load(class_weight + label, mask=readable, other=0.0)
    return tl.where(readable, label, -1).to(tl.int32), share, peak


@triton.jit
def label_terms(
    target, smoothing, row, inside,
    C: tl.constexpr, IGNORE_INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(column, share, peak) of the own label, then of the partner's (column -1 and weight 0 where there is none).

    A row of dense targets has a share of 1 in no column.
    """
    weight = (row * 0 + 1).to(ACC)
    if target.labels.dtype.element_ty.is_floating():
        return row * 0 - 1, weight, weight * 0, row * 0 - 1, weight * 0, weight * 0
    elif target.partner_labels is None:
        column, share, peak = label_term(
            target.labels, weight, target.class_weight, row, inside, smoothing, C, IGNORE_INDEX
        )
        return column, share, peak, row * 0 - 1, weight * 0, weight * 0
    else:
        lam = tl.load(target.lam + row, mask=inside, other=1.0).to(ACC)
        column, share, peak = label_term(
            target.labels, lam, target.class_weight, row, inside, smoothing, C, IGNORE_INDEX
        )
        other, other_share, other_peak = label_term(
            target.partner_labels, 1 - lam, target.class_weight, row, inside, smoothing, C, IGNORE_INDEX
        )
        return column, share, peak, other, other_share, other_peak


@triton.jit
def dense_tile(target, smoothing, offset, column, valid, C: tl.constexpr, ACC: tl.constexpr):
    """The part of y that every column has: dense targets, or the smoothing of indices before their share."""
    y = tl.zeros(valid.shape, ACC)
    if target.labels.dtype.element_ty.is_floating():
        y = tl.load(target.labels + offset, mask=valid, other=0.0).to(ACC)
        if smoothing is not None:
            y = y * whole(smoothing.kept, y) + whole(smoothing.uniform, y)
    elif smoothing is not None:
        y = whole(smoothing.uniform, y)
    if target.class_weight is not None:
        y *= tl.load(target.class_weight + column, mask=valid, other=0.0)
    return tl.where(valid, y, 0.0)


@triton.jit
def spread_tile(target, smoothing, terms, place, column, valid, C: tl.constexpr, ACC: tl.constexpr):
    """y of a tile but for the peaks of its labels."""
    y = dense_tile(target, smoothing, place, column, valid, C, ACC)
    if not target.labels.dtype.element_ty.is_floating():
        y *= of_rows(terms[1] + terms[4])
    return y


@triton.jit
def target_tile(target, smoothing, terms, place, column, valid, C: tl.constexpr, ACC: tl.constexpr):
    """y of a tile: dense, or the peaks of the labels and the smoothing by the row's share."""
    if target.labels.dtype.element_ty.is_floating():
        y = dense_tile(target, smoothing, place, column, valid, C, ACC)
    else:
        own, own_share, own_peak, other, other_share, other_peak = terms
        y = tl.where(column == of_rows(own), of_rows(own_peak), 0.0)
        if target.partner_labels is not None:
            y += tl.where(column == of_rows(other), of_rows(other_peak), 0.0)
        if smoothing is not None:
            y += spread_tile(target, smoothing, terms, place, column, valid, C, ACC)
        # Elsewhere -∞ is read, even if the column is a label's, which another lane reads.
        y = tl.where(valid, y, 0.0)
    return y


# Forward


@triton.jit
def log1p_of(e):
    """log(1 + e), e in [0, 1]: the rounding of 1 + e cancels in the quotient (Higham, Accuracy and Stability, §1.14.1)."""
    u = 1 + e
    return tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def quotient(a, b):
    """a / b, rounded correctly: a plain float32 division may be 2 ulp off, and η̂ must be 1 where η is 0."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def zero_where(zero, values):
    return tl.where(zero, 0.0, values)


@triton.jit
def anchor_of(top):
    """The maximum that exponents are taken from; 0 for rows of which nothing but -∞ was seen, as -∞ - -∞ is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def exponent(shifted):
    """log2 e^shifted. ``tl.exp2`` of it is one instruction on a GPU of NVIDIA, where ``tl.exp`` takes care of subnormals, too."""
    return shifted * LOG2_E


@triton.jit
def fold(top, total, weighted, linear, mass, z, y, HAS_DENSE: tl.constexpr, SIGMOID: tl.constexpr):
    """The state of each lane with one more tile in it; ``join`` makes the rows' of it.

    Softmax: top = max z, total = Σ e^(z - top), weighted = Σ e^(z - top) log2 e^(z - top), linear = Σ y (z - top), mass = Σ y.
    Sigmoid: total = Σ softplus(z), weighted = Σ H, linear = Σ softplus(z) - y z: of two sums the difference would cancel.
    """
    if SIGMOID:
        e = tl.exp2(exponent(-tl.abs(z)))
        log1p_e = log1p_of(e)
        softplus = tl.maximum(z, 0.0) + log1p_e
        total += sum_of_lanes(softplus)
        weighted += sum_of_lanes(log1p_e + zero_where(e == 0, tl.abs(z)) * e / (1 + e))
        linear += sum_of_lanes(softplus - y * zero_where(y == 0, z))
    else:
        seen = tl.where(z == z, z, float("-inf")) if INTERPRETED else z
        new_top = tl.maximum(top, tl.max(tl.max(seen, 3), 0))
        anchor = anchor_of(new_top)
        shifted = z - of_lanes(anchor)
        power = exponent(shifted)
        e = tl.exp2(power)
        moved = anchor_of(top) - anchor
        decay = tl.exp2(exponent(top - anchor))
        weighted = decay * (weighted + exponent(moved) * total) + sum_of_lanes(e * tl.maximum(power, LEAST_EXPONENT))
        total = decay * total + sum_of_lanes(e)
        if HAS_DENSE:
            linear += zero_where(mass == 0, moved) * mass + sum_of_lanes(y * zero_where(y == 0, shifted))
        top = new_top
    if HAS_DENSE:
        mass += sum_of_lanes(y)
    return top, total, weighted, linear, mass


@triton.jit
def join(tops, totals, weighteds, linears, masses, HAS_DENSE: tl.constexpr, SIGMOID: tl.constexpr):
    """The state of each row from those of its parts, (ROWS, parts)."""
    top = tl.max(tops, 1)
    linear, mass = tl.zeros_like(top), tl.zeros_like(top)
    if SIGMOID:
        total = tl.sum(totals, 1)
        weighted = tl.sum(weighteds, 1)
        linear = tl.sum(linears, 1)
    else:
        anchor = anchor_of(top)[:, None]
        decay = tl.exp2(exponent(tops - anchor))
        moved = anchor_of(tops) - anchor
        total = tl.sum(decay * totals, 1)
        weighted = tl.sum(decay * (weighteds + exponent(moved) * totals), 1)
        if HAS_DENSE:
            linear = tl.sum(linears + zero_where(masses == 0, moved) * masses, 1)
    if HAS_DENSE:
        mass = tl.sum(masses, 1)
    return top, total, weighted, linear, mass


@triton.jit
def q_hat(ce, entropy, lse, mass, DENSE: tl.constexpr, SIGMOID: tl.constexpr):
    """q̂ = H - CE + (Σy - 1)·lse; the last term is there only where targets are dense and so need not sum to 1."""
    q = entropy - ce
    if DENSE and not SIGMOID:
        q += zero_where(mass == 1, (mass - 1) * lse)
    return q


@triton.jit
def whole(halves, like):
    """The number that ``launch.halves`` took apart, in the dtype of ``like``."""
    zero = (like == like).to(like.dtype) * 0  # of that dtype also where the interpreter has halves of Python's
    return (zero + halves[0]) + halves[1]


@triton.jit
def penalty_of(q, threshold, PENALTY: tl.constexpr):
    """(value, slope) of the penalty: the rows of ``conventions.PENALTIES`` by number. A q of NaN stays NaN in both."""
    if PENALTY == 0:
        value = tl.abs(q)
        slope = tl.where(q > 0, 1.0, tl.where(q < 0, -1.0, q))
    elif PENALTY == 1:
        value = zero_where(q >= whole(threshold, q), -q)
        slope = zero_where(q >= whole(threshold, q), tl.where(q == q, -1.0, q))
    else:
        tl.static_assert(PENALTY == 2, "unknown penalty")
        value = -q
        slope = tl.where(q == q, -1.0, q)
    return value, slope


@triton.jit
def sign_entropy(entropy, slope):
    """H times the penalty's slope, ∞ where that is 0; as ``reference.sign_entropy``."""
    return tl.where(slope == 0, float("inf"), slope * tl.abs(entropy))


# Backward


@triton.jit
def split_sign(signed):
    """(H, slope) of ``sign_entropy``, by the sign bit: zero has one, too."""
    BITS: tl.constexpr = tl.int64 if signed.dtype == tl.float64 else tl.int32
    flat = signed == float("inf")
    slope = tl.where(signed.to(BITS, bitcast=True) < 0, -1.0, 1.0).to(signed.dtype)
    return zero_where(flat, tl.abs(signed)), zero_where(flat, slope)


@triton.jit
def gradient_of(z, g_ce, level, slope, lse, SIGMOID: tl.constexpr):
    """(p or its like, dz but for g_ce·y) of logits whose rows' values lie beside them.

    Softmax: dz = p (level - slope·log2 p) - g_ce·y. Sigmoid: level is g_lse, slope g_H.
    """
    if SIGMOID:
        e = tl.exp2(exponent(-tl.abs(z)))
        small = 1 / (1 + e)
        p = tl.where(z >= 0, small, e * small)
        variance = e * small * small
        return g_ce * p + level * p - slope * variance * zero_where(variance == 0, z)
    else:
        power = exponent(z - lse)
        return tl.exp2(power) * (level - slope * tl.maximum(power, LEAST_EXPONENT))
