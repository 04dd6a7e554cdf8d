"""Gradients that no backend needs to be fast at: with respect to targets and λ, and of the backward operators.

Plain PyTorch on any device, and itself differentiable, so that every operator can be differentiated any number of
times. Notation as in ``reference``; v is the upstream gradient of dz.
"""

import torch
from torch import Tensor

from ..conventions import IGNORE_INDEX
from . import reference
from .reference import _or_zero, _zero_where


def target_gradients(
    dy: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Carry the gradient ``dy`` (N, C) of ``reference.dense_target`` back to dense targets, or to λ (N,)."""
    if class_weight is not None:
        dy = dy * class_weight.to(dy.dtype)
    if target.dim() == 2:
        return (dy * (1 - label_smoothing)).to(target.dtype), None
    if partner is None:
        return None, None

    def of_label(labels: Tensor) -> Tensor:
        kept = labels != ignore_index
        at_label = dy.gather(1, labels.where(kept, 0).unsqueeze(1)).squeeze(1)
        smooth = label_smoothing * dy.mean(1) if label_smoothing else 0.0
        return _zero_where(~kept, at_label * (1 - label_smoothing) + smooth)

    return None, (of_label(target) - of_label(partner)).to(lam.dtype)


def ce_entropy_double_backward(
    v: Tensor,
    grad_ce: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    entropy: Tensor,
    lse: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    sigmoid: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of ⟨v, ce_entropy_backward(...)⟩ in the order of its first ten arguments."""
    z, v = logits.to(lse.dtype), v.to(lse.dtype)
    y = reference.dense_target(logits, target, partner, lam, class_weight, label_smoothing, ignore_index)
    g_ce, g_h, g_lse = (_or_zero(g, lse) for g in (grad_ce, grad_entropy, grad_lse))
    if sigmoid:
        p = torch.sigmoid(z)
        slope = p * torch.sigmoid(-z)
        curvature = slope * (1 - 2 * p)
        d_ce, d_lse = v * (p - y), v * p
        d_h = -v * _zero_where(slope == 0, z * slope)
        dz = v * ((g_ce + g_lse) * slope - g_h * (slope + _zero_where(curvature == 0, z * curvature)))
        d_entropy = d_shift = None
        dy = -g_ce * v
    else:
        log_p = reference.log_softmax(z, lse)
        p = torch.exp(log_p)
        mass = y.sum(1, keepdim=True)
        surprise = _zero_where(p == 0, p * (log_p + entropy.unsqueeze(1)))  # p (log p + H)
        d_ce, d_lse, d_h = v * (p * mass - y), v * p, -v * surprise
        dz = v * (p * (g_ce * mass + g_lse - g_h) - g_h * surprise)
        d_entropy = -g_h.squeeze(1) * (v * p).sum(1)
        d_shift = -dz.sum(1)
        dy = g_ce * ((v * p).sum(1, keepdim=True) - v)
    dtarget, dlam = target_gradients(dy, target, partner, lam, class_weight, label_smoothing, ignore_index)
    upstream = (
        None if g is None else d.sum(1).to(g.dtype)
        for g, d in ((grad_ce, d_ce), (grad_entropy, d_h), (grad_lse, d_lse))
    )
    return *upstream, dz.to(logits.dtype), d_entropy, d_shift, dtarget, None, dlam, None


def mixupe_loss_double_backward(
    v: Tensor,
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    parts: Tensor,
    signed_entropy: Tensor,
    lse: Tensor,
    *options,
) -> tuple[Tensor, Tensor]:
    """Gradients of ⟨v, mixupe_loss_backward(grad, logits, ...)⟩ with respect to ``grad`` and ``logits``.

    The coefficients are piecewise constant in the logits (the slope of the penalty; η̂ is detached) and linear in
    ``grad``; entropy and lse are functions of the logits, so their gradients go back through ``ce_entropy_backward``.
    """
    smoothing, sigmoid = options[-2:]
    target_options = (target, partner, lam, None, smoothing, IGNORE_INDEX, sigmoid)
    coefficients = reference.loss_coefficients(torch.ones_like(grad), target, parts, signed_entropy, *options)
    entropy, _ = reference.split_sign(signed_entropy)
    scaled = [grad * coefficient for coefficient in coefficients]
    *upstream, dz, d_entropy, d_lse = ce_entropy_double_backward(v, *scaled, logits, entropy, lse, *target_options)[:6]
    d_grad = sum((d * coefficient).sum() for d, coefficient in zip(upstream, coefficients, strict=True))
    if d_entropy is not None:
        back = torch.ops.mixupe.ce_entropy_backward
        dz = dz + back(None, d_entropy, d_lse, logits, entropy, lse, *target_options)
    return d_grad.to(grad.dtype), dz
