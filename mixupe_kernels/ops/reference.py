"""The definition of every operator, in plain PyTorch: what each backend must reproduce.

The functions here define ``torch.ops.mixupe`` and run on any device, with nothing compiled; the operators take their
NamedTuples as flat lists. Arithmetic is float64 for float64 inputs and float32 for every other dtype; results are rounded once, at the end.

Notation (MixupE, Zou et al., UAI 2023; mixup, Zhang et al., 2018): logits z, p = softmax(z), targets y, λ the weight
of a row's own sample. CE = -Σ y log p and H = -Σ p log p give eq. 5 of the paper as q̂ = (y - p)ᵀz = H - CE when Σy = 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..conventions import IGNORE_INDEX, accumulate_dtype, check_range, penalty_of, row_format, wide_dtype
from .arguments import (
    LossArguments,
    LossBackwardOptions,
    LossStats,
    Mixing,
    Parts,
    RowGradients,
    RowOptions,
    RowOutputs,
    RowStats,
    RowTarget,
    check_box,
    check_logits,
    check_products,
    check_sum,
    check_target,
    check_upstream,
)

# mix: x̃_i = λ_i x_i + (1 - λ_i) x_partner(i)   (mixup, eq. 1)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) if rows is None else rows


def partner_of(x: Tensor, partner: Tensor | None, rows: Tensor) -> Tensor:
    """``partner`` None is the flip pairing: row i with row B - 1 - i."""
    return x.shape[0] - 1 - rows if partner is None else partner


def inside_box(box: Tensor, x: Tensor) -> Tensor:
    """(H, W) bool: the pixels of ``x`` (..., H, W) within ``box``, (4,) int64 of top, bottom, left and right."""
    down, across = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    down = ((down >= box[0]) & (down < box[1])).unsqueeze(1)
    return down & (across >= box[2]) & (across < box[3])


def mix(
    x: Tensor,
    mixing: Mixing,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    box: Tensor | None = None,
) -> Tensor:
    """out_i = λ_i f(x[rows_i]) + (1 - λ_i) f(x[partner_i]) with f(v) = v·scale + shift per channel (dim 1).

    A sample of weight 0 is not read: λ = 1 is an exact copy, whatever the partner holds. Inside ``box`` (CutMix, Yun et
    al., 2019) λ is 0 for every row: (4,) int64 of top, bottom, left and right in the last two dimensions.
    """
    mixing.check(x, dtype)
    check_box(box, x)
    partner, lam, rows, scale, shift = mixing
    compute = accumulate_dtype(x.dtype)
    rows = rows_of(x, rows)
    partner = partner_of(x, partner, rows)
    check_range("partner", partner, 0, x.shape[0] - 1, f"in [0, {x.shape[0] - 1}]")
    check_range("rows", rows, 0, x.shape[0] - 1, f"in [0, {x.shape[0] - 1}]")
    check_range("lam", lam, 0, 1, "in [0, 1]")
    weight = lam.to(compute).expand(rows.shape[0]).view(-1, *[1] * (x.dim() - 1))
    if box is not None:
        weight = torch.where(inside_box(box, x), 0.0, weight)
    own, other = x[rows].to(compute), x[partner].to(compute)
    out = torch.where(weight == 1, own, torch.where(weight == 0, other, weight * own + (1 - weight) * other))
    if scale is not None and shift is not None:
        out = out * per_channel(scale.to(compute), x) + per_channel(shift.to(compute), x)
    out = out.to(dtype or x.dtype)
    return out.contiguous(memory_format=memory_format or row_format(x))


def mix_out(x: Tensor, mixing: Mixing, box: Tensor | None = None, *, out: Tensor) -> None:
    """``mix`` into a caller's buffer; ``out`` may be ``x`` itself when partner is None (flip)."""
    out.copy_(mix(x, mixing, out.dtype, box=box))


def mixed_target(
    labels: Tensor, partner: Tensor | None, lam: Tensor, rows: Tensor, num_mixed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """λ, partners, labels and partners' labels, (N,) each, of the ``rows`` (N,) taken from a batch of B samples.

    ``labels`` and ``partner`` (B,), ``lam`` 0-d or (B,) are the samples'. The rows from ``num_mixed`` on are clean: a clean
    row is its own partner, with λ = 1.
    """
    check_target(labels, partner, lam, rows, num_mixed)
    check_range("rows", rows, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
    if partner is not None:
        check_range("partner", partner, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
        partner = partner[rows]
    clean = torch.arange(rows.shape[0], device=rows.device) >= num_mixed
    partner = torch.where(clean, rows, partner_of(labels, partner, rows))
    return torch.where(clean, 1.0, lam[rows] if lam.dim() else lam), partner, labels[rows], labels[partner]


# Mixing is linear, so its backward is a weighted sum of rows again. gather_sum and row_dot are closed under
# differentiation: the gradient of each is made of the two.


def gather_sum(src: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """out_j = Σ_{t = offsets[j]}^{offsets[j+1] - 1} weight_t · src[index_t], summed in the order of t.

    ``src`` (M, ...), ``index`` and ``weight`` (T,), ``offsets`` (J + 1,) ascending from 0 to T. Rows no t points to are 0.
    """
    check_sum(src, index, weight, offsets)
    compute = accumulate_dtype(src.dtype)
    terms = src[index].to(compute) * weight.to(compute).view(-1, *[1] * (src.dim() - 1))
    segment = torch.searchsorted(offsets, torch.arange(index.shape[0], device=src.device), right=True) - 1
    out = terms.new_zeros((offsets.shape[0] - 1, *src.shape[1:]))
    return out.index_add(0, segment, terms).to(src.dtype)


def row_dot(a: Tensor, b: Tensor, a_index: Tensor, b_index: Tensor) -> Tensor:
    """⟨a[a_index_t], b[b_index_t]⟩ over everything but the first dimension → (T,) float32 (float64 for float64)."""
    check_products(a, b, a_index, b_index)
    compute = accumulate_dtype(a.dtype)
    products = a[a_index].to(compute) * b[b_index].to(compute)
    return products.flatten(1).sum(1) if products.dim() > 1 else products


# ce_entropy: (CE, H, lse) of each row, and the one backward for every loss made of them


def dense_target(logits: Tensor, target: RowTarget, options: RowOptions) -> Tensor:
    """The (N, C) targets y that the arguments stand for.

    Labels are (N, C) already, (N,) class indices, or with ``partner_labels`` and ``lam`` the mixture
    λ·onehot(labels) + (1 - λ)·onehot(partner_labels). A label equal to ``ignore_index`` has weight 0. Smoothing and
    class weights as in ``torch.nn.functional.cross_entropy``.
    """
    compute, classes = accumulate_dtype(logits.dtype), logits.shape[1]
    smoothing = options.label_smoothing
    if target.is_dense():
        y = target.labels.to(compute)
        if smoothing:
            y = y * (1 - smoothing) + smoothing / classes
    else:
        own = 1.0 if target.lam is None else target.lam.to(compute)
        terms = [(target.labels, own)]
        if target.partner_labels is not None:
            terms.append((target.partner_labels, 1 - own))
        y = logits.new_zeros(logits.shape, dtype=compute)
        for labels, weight in terms:
            kept = labels != options.ignore_index
            weight = (kept * weight).to(compute).unsqueeze(1)
            onehot = torch.zeros_like(y).scatter(1, labels.where(kept, 0).unsqueeze(1), 1.0)
            y = y + weight * (onehot * (1 - smoothing) + smoothing / classes)
    return y if options.class_weight is None else y * options.class_weight.to(compute)


def zero_where(zero: Tensor, values: Tensor) -> Tensor:
    return torch.where(zero, torch.zeros((), dtype=values.dtype, device=values.device), values)


def _check_rows(logits: Tensor, target: RowTarget, options: RowOptions) -> None:
    check_logits(logits)
    target.check(logits)
    options.check(logits)
    target.check_values(logits.shape[1], options.ignore_index)


def ce_entropy(logits: Tensor, target: RowTarget, options: RowOptions) -> RowOutputs:
    """(CE, H, lse) of each row, (N,) each. With ``sigmoid``, (BCE, H, Σ softplus) summed over the classes.

    A class with logit -∞ has p = 0 and adds 0; where its target is 0 too, it adds 0 to CE.
    """
    _check_rows(logits, target, options)
    z = logits.to(accumulate_dtype(logits.dtype))
    y = dense_target(logits, target, options)
    if options.sigmoid:
        e = torch.exp(-z.abs())
        softplus = z.clamp(min=0) + torch.log1p(e)
        entropy = torch.log1p(e) + zero_where(e == 0, z.abs() * e / (1 + e))
        ce = softplus - zero_where(y == 0, y * z)
        return RowOutputs(ce.sum(1), entropy.sum(1), softplus.sum(1))
    top = z.amax(1, keepdim=True)
    log_sum = torch.exp(z - top).sum(1, keepdim=True).log()
    log_p = z - top - log_sum
    p = torch.exp(log_p)
    entropy = -zero_where(p == 0, p * log_p).sum(1)
    # In float64: added to a label's share, what smoothing gives each of many classes would be rounded away.
    ce = -zero_where(y == 0, y * log_p).sum(1, dtype=wide_dtype(z.device)).to(z.dtype)
    return RowOutputs(ce, entropy, (top + log_sum).squeeze(1))


def log_softmax(z: Tensor, lse: Tensor) -> Tensor:
    """log p (N, C). What rounding took from ``lse`` (N,) is put back: under a large shift of all logits it is much."""
    log_p = z - lse.unsqueeze(1)
    return log_p - log_p.logsumexp(1, keepdim=True)


def columns_of(grads: RowGradients | RowStats, like: Tensor) -> list[Tensor]:
    """Each gradient as (N, 1) of the dtype of ``like`` (N,); zeros for one of None."""
    return [(torch.zeros_like(like) if grad is None else grad.to(like.dtype)).unsqueeze(1) for grad in grads]


def ce_entropy_backward(
    grads: RowGradients, logits: Tensor, stats: RowStats, target: RowTarget, options: RowOptions
) -> Tensor:
    """dz_k = p_k [g_ce·Σy + g_lse - g_H (log p_k + H)] - g_ce·y_k; a gradient of None is zero.

    With ``sigmoid``: dz_k = g_ce (σ_k - y_k) + g_lse σ_k - g_H z_k σ_k (1 - σ_k).
    """
    _check_rows(logits, target, options)
    grads.check(logits)
    stats.check(logits)
    z, lse = logits.to(accumulate_dtype(logits.dtype)), stats.lse
    y = dense_target(logits, target, options)
    g_ce, g_h, g_lse = columns_of(grads, lse)
    if options.sigmoid:
        p = torch.sigmoid(z)
        variance = p * torch.sigmoid(-z)
        dz = g_ce * (p - y) + g_lse * p - g_h * zero_where(variance == 0, z * variance)
        return dz.to(logits.dtype).contiguous()
    log_p = log_softmax(z, lse)
    p = torch.exp(log_p)
    from_entropy = zero_where(p == 0, p * (log_p + stats.entropy.unsqueeze(1)))
    dz = p * (g_ce * y.sum(1, keepdim=True) + g_lse) - g_h * from_entropy - g_ce * y
    return dz.to(logits.dtype).contiguous()


# mixupe_loss: L = η̂ (L_mix + γ L_clean + η R), R = w · mean penalty(q̂)   (MixupE, eq. 7-9; γ as in RegMixup)


def kept_labels(target: RowTarget, like: Tensor) -> Tensor:
    """The share of each row's labels that is not ignored, (N,)."""
    if target.is_dense():
        return torch.ones_like(like) if target.lam is None else target.lam.to(like.dtype)
    own = target.labels != IGNORE_INDEX
    if target.partner_labels is None or target.lam is None:
        return own.to(like.dtype)
    other = target.partner_labels != IGNORE_INDEX
    return torch.where(own & other, 1.0, own * target.lam + other * (1 - target.lam)).to(like.dtype)


def q_hat(rows: RowOutputs, target: RowTarget, label_smoothing: float, sigmoid: bool) -> Tensor:
    """q̂ = H - CE + (Σy - 1)·lse; the last term is there only where targets are dense and so need not sum to 1."""
    q = rows.entropy - rows.ce
    if target.is_dense() and not sigmoid:
        mass = target.labels.to(q.dtype).sum(1) * (1 - label_smoothing) + label_smoothing
        q = q + (mass - 1) * rows.lse
    return q


def loss_of_rows(
    ce: Tensor, kept: Tensor, value: Tensor, counted: Tensor, arguments: LossArguments, merge: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, parts) from each row's CE and kept share, (N,), and from the penalty and whether it counts, of any rows.

    ``parts`` are ``Parts`` as one tensor, constants to autograd. ``merge`` makes, of the six sums over these rows, those that
    the means are of: over the rows of all ranks.
    """
    split, weight = arguments.num_mixed, arguments.reg_weight
    rows = kept[:split].sum(), kept[split:].sum(), counted.sum().to(ce.dtype)
    sums = ce[:split].sum(), ce[split:].sum(), weight * zero_where(~counted, value).sum(), *rows
    return loss_of_sums(sums if merge is None else merge(sums), arguments)


def loss_of_sums(sums: tuple[Tensor, ...], arguments: LossArguments) -> tuple[Tensor, Tensor]:
    """The same from sums, 0-d each: CE of mixed and of clean rows, w times the penalties, and how many rows each is over."""
    eta, gamma, (mixed, clean, penalties, *rows_of) = arguments.eta, arguments.clean_weight, sums
    # 1 / 0 would make the gradient NaN even where it is not chosen.
    per_mix, per_clean, per_reg = (torch.where(rows > 0, 1 / torch.where(rows > 0, rows, 1.0), 0.0) for rows in rows_of)
    mix_loss, clean_loss, reg = mixed * per_mix, clean * per_clean, penalties * per_reg
    # Not 0·L_clean: where γ is 0, clean rows have no part in the loss even if their CE is infinite.
    cross_entropy = mix_loss + gamma * clean_loss if gamma else mix_loss
    total = cross_entropy + eta * reg
    eta_hat = torch.ones_like(total)
    if arguments.rescale:
        eta_hat = torch.where(total == 0, eta_hat, cross_entropy.abs() / total.abs()).detach()
    of_clean = eta_hat * gamma * per_clean if gamma else torch.zeros_like(eta_hat)
    factors = eta_hat * per_mix, of_clean, eta_hat * eta * (arguments.reg_weight * per_reg)
    parts = Parts(mix_loss, clean_loss, reg, eta_hat, *factors)
    return eta_hat * total, torch.stack(parts).detach()


def regularized(rows: RowOutputs, target: RowTarget, arguments: LossArguments) -> tuple[Tensor, Tensor]:
    """q̂ of the last ``num_reg`` rows, and whether each counts: one with an ignored label does not."""
    first = rows.ce.shape[0] - arguments.num_reg
    q = q_hat(rows, target, arguments.label_smoothing, arguments.sigmoid)
    return q[first:], kept_labels(target, rows.ce)[first:] == 1


def penalized(
    rows: RowOutputs, target: RowTarget, arguments: LossArguments, merge: Callable | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, parts, signed entropy) of rows whose CE, H and lse are known."""
    q, counted = regularized(rows, target, arguments)
    penalty = penalty_of(arguments.penalty)
    value = penalty.value(q, arguments.threshold)
    slope = torch.where(q.isnan(), q, penalty.slope(q, arguments.threshold))
    loss, parts = loss_of_rows(rows.ce, kept_labels(target, rows.ce), value, counted, arguments, merge)
    elsewhere = q.new_zeros(rows.ce.shape[0] - q.shape[0])
    return loss, parts, sign_entropy(rows.entropy, torch.cat([elsewhere, zero_where(~counted, slope)]))


def mixupe_loss(logits: Tensor, target: RowTarget, arguments: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, parts, signed entropy, lse): a 0-d loss, its ``Parts`` as one tensor, and two floats a row, (N,) each.

    L_mix is of the first ``num_mixed`` rows, L_clean of all others, R of the last ``num_reg``; ignored labels leave all three.
    """
    check_logits(logits)
    arguments.check(logits)
    rows = ce_entropy(logits, target, arguments.of_rows())
    return *penalized(rows, target, arguments), rows.lse


def sign_entropy(entropy: Tensor, slope: Tensor) -> Tensor:
    """H times the penalty's slope at q̂, which is -1, 0 or 1; ∞ where it is 0, since H then has no part in the gradient.

    With lse, this is all that the backward has to keep of a row: two floats. Rounding may have made H negative, or a
    negative zero.
    """
    return torch.where(slope == 0, torch.inf, slope * entropy.abs())


def split_sign(signed_entropy: Tensor) -> tuple[Tensor, Tensor]:
    """(H, slope) of ``sign_entropy``; H is 0 where the slope is."""
    flat = signed_entropy.isinf()
    slope = torch.where(signed_entropy.signbit(), -1.0, 1.0).to(signed_entropy.dtype)
    return zero_where(flat, signed_entropy.abs()), zero_where(flat, slope)


def loss_coefficients(grad: Tensor, target: RowTarget, stats: LossStats, options: LossBackwardOptions) -> RowGradients:
    """The gradients of ``grad``·loss with respect to CE, H and lse; η̂ is a constant (detached, MixupE eq. 9)."""
    _, slope = split_sign(stats.signed_entropy)
    parts = Parts(*stats.parts.unbind())
    grad = grad.to(slope.dtype)
    mixed = torch.arange(slope.shape[0], device=slope.device) < options.num_mixed
    g_q = zero_where(slope == 0, grad * parts.of_penalty * slope)
    g_ce = torch.where(mixed, grad * parts.of_mix, zero_where(parts.of_clean == 0, grad * parts.of_clean)) - g_q
    g_lse = torch.zeros_like(g_q)
    if target.is_dense() and not options.sigmoid:
        smoothing = options.label_smoothing
        g_lse = g_q * (target.labels.to(g_q.dtype).sum(1) * (1 - smoothing) + smoothing - 1)
    # Where p is a constant, H has no gradient of its own.
    g_entropy = torch.zeros_like(g_q) if penalty_of(options.penalty).detached else g_q
    return RowGradients(g_ce, g_entropy, g_lse)


def mixupe_loss_backward(
    grad: Tensor, logits: Tensor, target: RowTarget, stats: LossStats, options: LossBackwardOptions
) -> Tensor:
    """The gradient of ``grad``·loss with respect to the logits, (N, C)."""
    check_logits(logits)
    check_upstream(grad, logits)
    for arguments in (target, stats, options):
        arguments.check(logits)
    entropy, _ = split_sign(stats.signed_entropy)
    coefficients = loss_coefficients(grad, target, stats, options)
    return ce_entropy_backward(coefficients, logits, RowStats(entropy, stats.lse), target, options.of_rows())


def mixupe_loss_backward_out(
    grad: Tensor, logits: Tensor, target: RowTarget, stats: LossStats, options: LossBackwardOptions, *, out: Tensor
) -> None:
    """``mixupe_loss_backward`` into ``out``, which may be the logits themselves."""
    out.copy_(mixupe_loss_backward(grad, logits, target, stats, options))


def with_gradient(mixupe_loss: Callable, mixupe_loss_backward: Callable) -> Callable:
    """A backend's ``mixupe_loss_with_gradient``, made of its two operators."""

    @torch.no_grad()
    def mixupe_loss_with_gradient(
        logits: Tensor, target: RowTarget, arguments: LossArguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, parts, gradient): ``mixupe_loss`` and its ``mixupe_loss_backward`` for an upstream gradient of 1."""
        loss, *stats = mixupe_loss(logits, target, arguments)
        stats, options = LossStats(*stats), arguments.of_backward()
        return loss, stats.parts, mixupe_loss_backward(torch.ones_like(loss), logits, target, stats, options)

    return mixupe_loss_with_gradient


mixupe_loss_with_gradient = with_gradient(mixupe_loss, mixupe_loss_backward)
