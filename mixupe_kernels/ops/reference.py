"""The definition of every operator, in plain PyTorch: what each backend must reproduce.

The functions here have the signatures of ``torch.ops.mixupe`` and run on any device, with nothing compiled.
Arithmetic is float64 for float64 inputs and float32 for every other dtype; results are rounded once, at the end.

Notation (MixupE, Zou et al., UAI 2023; mixup, Zhang et al., 2018): logits z, p = softmax(z), targets y, λ the weight
of a row's own sample. CE = -Σ y log p and H = -Σ p log p give eq. 5 of the paper as q̂ = (y - p)ᵀz = H - CE when Σy = 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..conventions import IGNORE_INDEX, PENALTIES, accumulate_dtype, check_range, row_format

# mix: x̃_i = λ_i x_i + (1 - λ_i) x_partner(i)   (mixup, eq. 1)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) if rows is None else rows


def _partner_of(x: Tensor, partner: Tensor | None, rows: Tensor) -> Tensor:
    """``partner`` None is the flip pairing: row i with row B - 1 - i."""
    return x.shape[0] - 1 - rows if partner is None else partner


def check_box(box: Tensor | None, x: Tensor) -> None:
    if box is None:
        return
    checks.dtype("box", box, (torch.int64,))
    checks.shape("box", box, (4,))
    checks.same_device("box", box, "x", x)
    if x.dim() < 3:
        raise ValueError(f"box needs x of shape (B, ..., H, W), got {tuple(x.shape)}")


def inside_box(box: Tensor, x: Tensor) -> Tensor:
    """(H, W) bool: the pixels of ``x`` (..., H, W) within ``box``, (4,) int64 of top, bottom, left and right."""
    down, across = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    down = ((down >= box[0]) & (down < box[1])).unsqueeze(1)
    return down & (across >= box[2]) & (across < box[3])


def mix(
    x: Tensor,
    partner: Tensor | None,
    lam: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    box: Tensor | None = None,
) -> Tensor:
    """out_i = λ_i f(x[rows_i]) + (1 - λ_i) f(x[partner_i]) with f(v) = v·scale + shift per channel (dim 1).

    A sample of weight 0 is not read: λ = 1 is an exact copy, whatever the partner holds. Inside ``box`` (CutMix, Yun et
    al., 2019) λ is 0 for every row: (4,) int64 of top, bottom, left and right in the last two dimensions.
    """
    check_box(box, x)
    compute = accumulate_dtype(x.dtype)
    rows = _rows_of(x, rows)
    partner = _partner_of(x, partner, rows)
    check_range("partner", partner, 0, x.shape[0] - 1, f"in [0, {x.shape[0] - 1}]")
    check_range("rows", rows, 0, x.shape[0] - 1, f"in [0, {x.shape[0] - 1}]")
    check_range("lam", lam, 0, 1, "in [0, 1]")
    weight = lam.to(compute).expand(rows.shape[0]).view(-1, *[1] * (x.dim() - 1))
    if box is not None:
        weight = torch.where(inside_box(box, x), 0.0, weight)
    own, other = x[rows].to(compute), x[partner].to(compute)
    out = torch.where(weight == 1, own, torch.where(weight == 0, other, weight * own + (1 - weight) * other))
    if scale is not None:
        out = out * _per_channel(scale.to(compute), x) + _per_channel(shift.to(compute), x)
    out = out.to(dtype or x.dtype)
    return out.contiguous(memory_format=memory_format or row_format(x))


def mix_out(
    x: Tensor,
    partner: Tensor | None,
    lam: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    box: Tensor | None = None,
    *,
    out: Tensor,
) -> None:
    """``mix`` into a caller's buffer; ``out`` may be ``x`` itself when partner is None (flip)."""
    out.copy_(mix(x, partner, lam, rows, scale, shift, out.dtype, box=box))


def mixed_target(
    labels: Tensor, partner: Tensor | None, lam: Tensor, rows: Tensor, num_mixed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """λ, partners, labels and partners' labels, (N,) each, of the ``rows`` (N,) taken from a batch of B samples.

    ``labels`` and ``partner`` (B,), ``lam`` 0-d or (B,) are the samples'. The rows from ``num_mixed`` on are clean: a clean
    row is its own partner, with λ = 1.
    """
    check_range("rows", rows, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
    if partner is not None:
        check_range("partner", partner, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
        partner = partner[rows]
    clean = torch.arange(rows.shape[0], device=rows.device) >= num_mixed
    partner = torch.where(clean, rows, _partner_of(labels, partner, rows))
    return torch.where(clean, 1.0, lam[rows] if lam.dim() else lam), partner, labels[rows], labels[partner]


# Mixing is linear, so its backward is a weighted sum of rows again. gather_sum and row_dot are closed under
# differentiation: the gradient of each is made of the two.


def gather_sum(src: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """out_j = Σ_{t = offsets[j]}^{offsets[j+1] - 1} weight_t · src[index_t], summed in the order of t.

    ``src`` (M, ...), ``index`` and ``weight`` (T,), ``offsets`` (J + 1,) ascending from 0 to T. Rows no t points to are 0.
    """
    compute = accumulate_dtype(src.dtype)
    terms = src[index].to(compute) * weight.to(compute).view(-1, *[1] * (src.dim() - 1))
    segment = torch.searchsorted(offsets, torch.arange(index.shape[0], device=src.device), right=True) - 1
    out = terms.new_zeros((offsets.shape[0] - 1, *src.shape[1:]))
    return out.index_add(0, segment, terms).to(src.dtype)


def row_dot(a: Tensor, b: Tensor, a_index: Tensor, b_index: Tensor) -> Tensor:
    """⟨a[a_index_t], b[b_index_t]⟩ over everything but the first dimension → (T,) float32 (float64 for float64)."""
    compute = accumulate_dtype(a.dtype)
    products = a[a_index].to(compute) * b[b_index].to(compute)
    return products.flatten(1).sum(1) if products.dim() > 1 else products


# ce_entropy: (CE, H, lse) of each row, and the one backward for every loss made of them


def dense_target(
    logits: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The (N, C) targets y that the arguments stand for.

    ``target`` is (N, C) already, (N,) class indices, or with ``partner`` and ``lam`` (N,) the mixture
    λ·onehot(target) + (1 - λ)·onehot(partner). A label equal to ``ignore_index`` has weight 0. Smoothing and
    class weights as in ``torch.nn.functional.cross_entropy``.
    """
    compute, classes = accumulate_dtype(logits.dtype), logits.shape[1]
    if target.dim() == 2:
        y = target.to(compute)
        if label_smoothing:
            y = y * (1 - label_smoothing) + label_smoothing / classes
    else:
        terms = [(target, 1.0)] if partner is None else [(target, lam.to(compute)), (partner, 1 - lam.to(compute))]
        y = logits.new_zeros(logits.shape, dtype=compute)
        for labels, weight in terms:
            kept = labels != ignore_index
            weight = (kept * weight).to(compute).unsqueeze(1)
            onehot = torch.zeros_like(y).scatter(1, labels.where(kept, 0).unsqueeze(1), 1.0)
            y = y + weight * (onehot * (1 - label_smoothing) + label_smoothing / classes)
    return y if class_weight is None else y * class_weight.to(compute)


def check_classes(target: Tensor, partner: Tensor | None, classes: int, ignore_index: int) -> None:
    """Refuse class indices outside [0, classes) other than ``ignore_index``."""
    for labels in () if target.dim() == 2 else (target,) if partner is None else (target, partner):
        kept = labels.where(labels != ignore_index, 0)
        check_range("target", kept, 0, classes - 1, f"a class in [0, {classes - 1}]")


def _zero_where(zero: Tensor, values: Tensor) -> Tensor:
    return torch.where(zero, torch.zeros((), dtype=values.dtype, device=values.device), values)


def ce_entropy(
    logits: Tensor,
    target: Tensor,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, H, lse) of each row, (N,) each. With ``sigmoid``, (BCE, H, Σ softplus) summed over the classes.

    A class with logit -∞ has p = 0 and adds 0; where its target is 0 too, it adds 0 to CE.
    """
    check_classes(target, partner, logits.shape[1], ignore_index)
    z = logits.to(accumulate_dtype(logits.dtype))
    y = dense_target(logits, target, partner, lam, class_weight, label_smoothing, ignore_index)
    if sigmoid:
        e = torch.exp(-z.abs())
        softplus = z.clamp(min=0) + torch.log1p(e)
        entropy = torch.log1p(e) + _zero_where(e == 0, z.abs() * e / (1 + e))
        ce = softplus - _zero_where(y == 0, y * z)
        return ce.sum(1), entropy.sum(1), softplus.sum(1)
    top = z.amax(1, keepdim=True)
    log_sum = torch.exp(z - top).sum(1, keepdim=True).log()
    log_p = z - top - log_sum
    p = torch.exp(log_p)
    entropy = -_zero_where(p == 0, p * log_p).sum(1)
    # In float64: added to a label's share, what smoothing gives each of many classes would be rounded away.
    ce = -_zero_where(y == 0, y * log_p).sum(1, dtype=torch.float64).to(z.dtype)
    return ce, entropy, (top + log_sum).squeeze(1)


def log_softmax(z: Tensor, lse: Tensor) -> Tensor:
    """log p (N, C). What rounding took from ``lse`` (N,) is put back: under a large shift of all logits it is much."""
    log_p = z - lse.unsqueeze(1)
    return log_p - log_p.logsumexp(1, keepdim=True)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like).unsqueeze(1) if grad is None else grad.to(like.dtype).unsqueeze(1)


def ce_entropy_backward(
    grad_ce: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    entropy: Tensor,
    lse: Tensor,
    target: Tensor,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sigmoid: bool = False,
) -> Tensor:
    """dz_k = p_k [g_ce·Σy + g_lse - g_H (log p_k + H)] - g_ce·y_k; a gradient of None is zero.

    With ``sigmoid``: dz_k = g_ce (σ_k - y_k) + g_lse σ_k - g_H z_k σ_k (1 - σ_k).
    """
    z = logits.to(accumulate_dtype(logits.dtype))
    y = dense_target(logits, target, partner, lam, class_weight, label_smoothing, ignore_index)
    g_ce, g_h, g_lse = (_or_zero(g, lse) for g in (grad_ce, grad_entropy, grad_lse))
    if sigmoid:
        p = torch.sigmoid(z)
        variance = p * torch.sigmoid(-z)
        dz = g_ce * (p - y) + g_lse * p - g_h * _zero_where(variance == 0, z * variance)
        return dz.to(logits.dtype).contiguous()
    log_p = log_softmax(z, lse)
    p = torch.exp(log_p)
    from_entropy = _zero_where(p == 0, p * (log_p + entropy.unsqueeze(1)))
    dz = p * (g_ce * y.sum(1, keepdim=True) + g_lse) - g_h * from_entropy - g_ce * y
    return dz.to(logits.dtype).contiguous()


# mixupe_loss: L = η̂ (L_mix + η R), R = w · mean penalty(q̂)   (MixupE, eq. 7-9)


def kept_labels(target: Tensor, partner: Tensor | None, lam: Tensor | None) -> Tensor | None:
    """The share of each row's labels that is not ignored, (N,); None for dense targets, which ignore nothing."""
    if target.dim() == 2:
        return None
    own = target != IGNORE_INDEX
    if partner is None:
        return own.to(torch.float32)
    other = partner != IGNORE_INDEX
    return torch.where(own & other, 1.0, own * lam + other * (1 - lam))


def q_hat(
    ce: Tensor, entropy: Tensor, lse: Tensor, target: Tensor, sigmoid: bool = False, label_smoothing=0.0
) -> Tensor:
    """q̂ = H - CE + (Σy - 1)·lse; the last term is there only where targets are dense and so need not sum to 1."""
    if target.dim() == 2 and not sigmoid:
        mass = target.to(lse.dtype).sum(1) * (1 - label_smoothing) + label_smoothing
        return entropy - ce + _zero_where(mass == 1, (mass - 1) * lse)
    return entropy - ce


def mixupe_loss(
    logits: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    eta: Tensor,
    reg_weight: Tensor,
    num_mixed: int,
    num_reg: int,
    penalty: int = 0,
    threshold: float = 1.0,
    rescale: bool = True,
    label_smoothing: float = 0.0,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, parts, signed_entropy, lse); penalty indexes PENALTIES.

    parts = (L_mix, R, η̂, ∂L/∂CE of a row of L_mix, ∂L/∂penalty of a row of R). The first ``num_mixed`` rows carry L_mix
    and the last ``num_reg`` carry R. Rows whose label is ignored leave both means, and a mean over no rows is 0.
    """
    rows = ce_entropy(logits, target, partner, lam, None, label_smoothing, IGNORE_INDEX, sigmoid)
    options = (num_mixed, num_reg, penalty, threshold, rescale, label_smoothing, sigmoid)
    return *loss_of_rows(*rows, target, partner, lam, eta, reg_weight, *options), rows[2]


def loss_of_rows(
    ce: Tensor,
    entropy: Tensor,
    lse: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    eta: Tensor,
    reg_weight: Tensor,
    num_mixed: int,
    num_reg: int,
    penalty: int,
    threshold: float,
    rescale: bool,
    label_smoothing: float,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, parts, signed_entropy) of rows whose CE, H and lse are known."""
    q = q_hat(ce, entropy, lse, target, sigmoid, label_smoothing)
    kept = kept_labels(target, partner, lam)
    kept = torch.ones_like(ce) if kept is None else kept.to(ce.dtype)
    regularized = (torch.arange(ce.shape[0], device=ce.device) >= ce.shape[0] - num_reg) & (kept == 1)
    value = (q.abs(), _zero_where(q >= threshold, -q), -q)[penalty]
    slope = (torch.sign(q), -(q < threshold).to(q.dtype), -torch.ones_like(q))[penalty]
    slope = torch.where(q.isnan(), q, slope)
    rows_mix, rows_reg = kept[:num_mixed].sum(), regularized.sum().to(ce.dtype)
    per_mix = torch.where(rows_mix > 0, 1 / rows_mix, 0.0).to(ce.dtype)
    per_reg = reg_weight.to(ce.dtype) * torch.where(rows_reg > 0, 1 / rows_reg, 0.0).to(ce.dtype)
    eta = eta.to(ce.dtype)
    mix_loss = ce[:num_mixed].sum() * per_mix
    reg = _zero_where(~regularized, value).sum() * per_reg
    total = mix_loss + eta * reg
    eta_hat = torch.where(total == 0, 1.0, mix_loss.abs() / total.abs()) if rescale else torch.ones_like(total)
    eta_hat = eta_hat.to(ce.dtype)
    parts = torch.stack([mix_loss, reg, eta_hat, eta_hat * per_mix, eta_hat * eta * per_reg])
    return eta_hat * total, parts, sign_entropy(entropy, _zero_where(~regularized, slope))


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
    return _zero_where(flat, signed_entropy.abs()), _zero_where(flat, slope)


def loss_coefficients(
    grad: Tensor,
    target: Tensor,
    parts: Tensor,
    signed_entropy: Tensor,
    num_mixed: int,
    penalty: int,
    label_smoothing: float,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (g_ce, g_H, g_lse) of ``grad``·loss, (N,) each; η̂ is a constant (detached, MixupE eq. 9)."""
    _, slope = split_sign(signed_entropy)
    grad = grad.to(slope.dtype)
    outside = torch.arange(slope.shape[0], device=slope.device) >= num_mixed
    g_q = _zero_where(slope == 0, grad * parts[4] * slope)
    g_ce = _zero_where(outside, (grad * parts[3]).expand_as(slope)) - g_q
    g_lse = torch.zeros_like(g_q)
    if target.dim() == 2 and not sigmoid:
        g_lse = g_q * (target.to(g_q.dtype).sum(1) * (1 - label_smoothing) + label_smoothing - 1)
    # linear_detached: (y - p) is a constant, so H has no gradient of its own.
    g_entropy = torch.zeros_like(g_q) if PENALTIES[penalty] == "linear_detached" else g_q
    return g_ce, g_entropy, g_lse


def mixupe_loss_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    parts: Tensor,
    signed_entropy: Tensor,
    lse: Tensor,
    num_mixed: int,
    penalty: int = 0,
    label_smoothing: float = 0.0,
    sigmoid: bool = False,
) -> Tensor:
    """The gradient of ``grad``·loss with respect to the logits, (N, C)."""
    options = (num_mixed, penalty, label_smoothing, sigmoid)
    coefficients = loss_coefficients(grad, target, parts, signed_entropy, *options)
    entropy, _ = split_sign(signed_entropy)
    return ce_entropy_backward(
        *coefficients, logits, entropy, lse, target, partner, lam, None, label_smoothing, IGNORE_INDEX, sigmoid
    )


def mixupe_loss_backward_out(*args, out: Tensor, **kwargs) -> None:
    """``mixupe_loss_backward`` into ``out``, which may be the logits themselves."""
    out.copy_(mixupe_loss_backward(*args, **kwargs))


def _check_loss(logits: Tensor, labels: tuple, weights: tuple[Tensor, Tensor], counts: tuple[int, int]) -> None:
    """What compiled operators check of these arguments, too: the loss calls this one before it has looked at them."""
    checks.dtype("logits", logits, checks.LOGITS_DTYPES)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (N, C) with C >= 1, got {tuple(logits.shape)}")
    (target, partner, lam), (eta, reg_weight) = labels, weights
    rows, compute = logits.shape[0], accumulate_dtype(logits.dtype)
    dense = target.dim() == 2
    if not dense and (partner is None) != (lam is None):
        raise ValueError("partner and lam must be given together")
    for name, value, dtype, shape in (
        ("target", target, compute if dense else torch.int64, logits.shape if dense else (rows,)),
        ("partner", partner, torch.int64, (rows,)),
        ("lam", lam, compute, (rows,)),
        ("eta", eta, compute, ()),
        ("reg_weight", reg_weight, compute, ()),
    ):
        if value is not None:
            checks.dtype(name, value, (dtype,))
            checks.shape(name, value, () if name == "lam" and value.dim() == 0 else shape)
            checks.same_device(name, value, "logits", logits)
    for name, count in zip(("num_mixed", "num_reg"), counts, strict=True):
        if not 0 <= count <= rows:
            raise ValueError(f"{name} must be in [0, {rows}], got {count}")


def with_gradient(mixupe_loss: Callable, mixupe_loss_backward: Callable) -> Callable:
    """A backend's ``mixupe_loss_with_gradient``, made of its two operators."""

    @torch.no_grad()
    def mixupe_loss_with_gradient(
        logits: Tensor,
        target: Tensor,
        partner: Tensor | None,
        lam: Tensor | None,
        eta: Tensor,
        reg_weight: Tensor,
        num_mixed: int,
        num_reg: int,
        penalty: int = 0,
        threshold: float = 1.0,
        rescale: bool = True,
        label_smoothing: float = 0.0,
        sigmoid: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, parts, gradient): ``mixupe_loss`` and its ``mixupe_loss_backward`` for an upstream gradient of 1."""
        labels, tail = (target, partner, lam), (label_smoothing, sigmoid)
        _check_loss(logits, labels, (eta, reg_weight), (num_mixed, num_reg))
        loss, parts, *rows = mixupe_loss(
            logits, *labels, eta, reg_weight, num_mixed, num_reg, penalty, threshold, rescale, *tail
        )
        one = torch.ones_like(loss)
        return loss, parts, mixupe_loss_backward(one, logits, *labels, parts, *rows, num_mixed, penalty, *tail)

    return mixupe_loss_with_gradient


mixupe_loss_with_gradient = with_gradient(mixupe_loss, mixupe_loss_backward)
