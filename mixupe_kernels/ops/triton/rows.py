"""Device functions of one row of logits: where its columns lie, its targets, its running state and its gradient.

All of them work on tiles of several rows, (ROWS, BLOCK). Invalid columns hold a logit of -∞ and a target of 0, which
add 0 to every sum.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Parts, RowTarget


class Target(NamedTuple):
    """The targets of N rows: dense (N, C), or class indices (N,), mixed where there is a partner. None compiles away."""

    labels: Tensor
    partner_labels: Tensor | None
    lam: Tensor | None
    class_weight: Tensor | None


OF_MIX, OF_CLEAN, OF_PENALTY = (
    tl.constexpr(Parts._fields.index(name)) for name in ("of_mix", "of_clean", "of_penalty")
)
PEEL_FROM = tl.constexpr(512)  # shorter rows have too few columns for separate edges to pay


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
    """(offset, head, body): the aligned part of each row begins ``head`` columns into it and has ``body`` columns."""
    start = row.to(tl.int64) * STRIDE
    if PEEL:
        offset = (start + (VEC - 1)) // VEC * VEC
        head = (offset - start).to(tl.int32)
        body = (C - head) // VEC * VEC
    else:
        offset = start
        head = row * 0
        body = head + C
    return offset, head, body


@triton.jit
def edge_columns(head, body, C: tl.constexpr, VEC: tl.constexpr):
    """(columns, valid), (ROWS, 2 VEC): what lies before and after the aligned part."""
    lane = tl.arange(0, 2 * VEC)[None, :]
    after = (head + body)[:, None] + lane - VEC
    column = tl.where(lane < VEC, lane, after)
    return column, tl.where(lane < VEC, lane < head[:, None], after < C)


# Targets. Of a target of class indices, `share` is how much of the row's weight a label carries (0 where ignored) and
# `peak` what its class receives beyond the smoothing. A label out of range makes its row NaN, and is not read.


@triton.jit
def label_term(
    labels, weight, class_weight, row, inside,
    C: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, IGNORE_INDEX: tl.constexpr,
):  # fmt: skip
    label = tl.load(labels + row, mask=inside, other=IGNORE_INDEX)
    kept = label != IGNORE_INDEX
    readable = kept & (label >= 0) & (label < C)
    share = tl.where(kept, tl.where(readable, weight, float("nan")), 0.0)
    peak = share * (1 - LABEL_SMOOTHING)
    if class_weight is not None:
        peak *= tl.load(class_weight + label, mask=readable, other=0.0)
    return tl.where(readable, label, -1).to(tl.int32), share, peak


@triton.jit
def label_terms(
    target, row, inside,
    C: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, IGNORE_INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(column, share, peak) of the own label, then of the partner's (column -1 and weight 0 where there is none)."""
    weight = (row * 0 + 1).to(ACC)
    if target.partner_labels is None:
        column, share, peak = label_term(
            target.labels, weight, target.class_weight, row, inside, C, LABEL_SMOOTHING, IGNORE_INDEX
        )
        return column, share, peak, row * 0 - 1, weight * 0, weight * 0
    else:
        lam = tl.load(target.lam + row, mask=inside, other=1.0).to(ACC)
        column, share, peak = label_term(
            target.labels, lam, target.class_weight, row, inside, C, LABEL_SMOOTHING, IGNORE_INDEX
        )
        other, other_share, other_peak = label_term(
            target.partner_labels, 1 - lam, target.class_weight, row, inside, C, LABEL_SMOOTHING, IGNORE_INDEX
        )
        return column, share, peak, other, other_share, other_peak


@triton.jit
def dense_tile(
    target, offset, column, valid,
    C: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The part of y that every column has: dense targets, or the smoothing of indices before their share."""
    if target.labels.dtype.element_ty.is_floating():
        y = tl.load(target.labels + offset, mask=valid, other=0.0).to(ACC)
        if LABEL_SMOOTHING != 0:
            y = y * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / C
    else:
        y = tl.full(valid.shape, LABEL_SMOOTHING / C, ACC)
    if target.class_weight is not None:
        y *= tl.load(target.class_weight + column, mask=valid, other=0.0)
    return tl.where(valid, y, 0.0)


@triton.jit
def target_tile(
    target, terms, place, column, valid,
    C: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of a tile: dense, or the peaks of the labels and the smoothing by the row's share."""
    if target.labels.dtype.element_ty.is_floating():
        y = dense_tile(target, place, column, valid, C, LABEL_SMOOTHING, ACC)
    else:
        own, own_share, own_peak, other, other_share, other_peak = terms
        y = tl.where(column == own[:, None], own_peak[:, None], 0.0)
        if target.partner_labels is not None:
            y += tl.where(column == other[:, None], other_peak[:, None], 0.0)
        if LABEL_SMOOTHING != 0:
            smoothing = dense_tile(target, place, column, valid, C, LABEL_SMOOTHING, ACC)
            y += smoothing * (own_share + other_share)[:, None]
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
def fold(top, total, weighted, linear, mass, z, y, HAS_DENSE: tl.constexpr, SIGMOID: tl.constexpr):
    """The state of each row with one more tile in it.

    Softmax: top = max z, total = Σ e^(z - top), weighted = Σ e^(z - top) (z - top), linear = Σ y (z - top), mass = Σ y.
    Sigmoid: total = Σ softplus(z), weighted = Σ H, linear = Σ softplus(z) - y z: of two sums the difference would cancel.
    """
    if SIGMOID:
        e = tl.exp(-tl.abs(z))
        log1p_e = log1p_of(e)
        softplus = tl.maximum(z, 0.0) + log1p_e
        total += tl.sum(softplus, 1)
        weighted += tl.sum(log1p_e + zero_where(e == 0, tl.abs(z)) * e / (1 + e), 1)
        linear += tl.sum(softplus - y * zero_where(y == 0, z), 1)
    else:
        new_top = tl.maximum(top, tl.max(z, 1))
        anchor = anchor_of(new_top)
        shifted = z - anchor[:, None]
        e = tl.exp(shifted)
        decay = tl.exp(top - anchor)
        move = anchor_of(top) - anchor
        weighted = decay * (weighted + move * total) + tl.sum(e * zero_where(e == 0, shifted), 1)
        total = decay * total + tl.sum(e, 1)
        if HAS_DENSE:
            linear += move * mass + tl.sum(y * zero_where(y == 0, shifted), 1)
        top = new_top
    if HAS_DENSE:
        mass += tl.sum(y, 1)
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
def gradient_tile(z, y, g_ce, g_entropy, g_p, entropy, lse, SIGMOID: tl.constexpr):
    """dz of a tile; g_p, g_ce·Σy + g_lse (of sigmoids g_lse alone), multiplies p.

    The label columns are subtracted here, in the accumulation dtype, before the one store: read back and corrected in
    bfloat16, a gradient whose p rounds to 1 would be lost altogether.
    """
    g_ce, g_entropy, g_p = g_ce[:, None], g_entropy[:, None], g_p[:, None]
    if SIGMOID:
        e = tl.exp(-tl.abs(z))
        small = 1 / (1 + e)
        p = tl.where(z >= 0, small, e * small)
        variance = e * small * small
        return g_ce * (p - y) + g_p * p - g_entropy * variance * zero_where(variance == 0, z)
    else:
        log_p = z - lse[:, None]
        p = tl.exp(log_p)
        from_entropy = p * zero_where(p == 0, log_p + entropy[:, None])
        return p * g_p - g_entropy * from_entropy - g_ce * y
