"""Derivatives that no backend needs to be fast at: in targets and λ, in forward mode, and of the backward operator.

Plain PyTorch on any device, and itself differentiable, so that every operator can be differentiated any number of
times. Notation as in ``reference``; v is the upstream gradient of dz.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..conventions import accumulate_dtype
from .arguments import RowGradients, RowOptions, RowOutputs, RowStats, RowTarget
from .reference import columns_of, dense_target, log_softmax, zero_where


def alias(value: Tensor) -> Tensor:
    """The same values under a name of their own: a gradient in it does not go on into what ``value`` was made from.

    ``torch.autograd.grad`` in several tensors would count what one of them takes from another twice, once in its own result.
    """
    return value.view_as(value)


def target_gradients(dy: Tensor, target: RowTarget, options: RowOptions) -> tuple[Tensor | None, Tensor | None]:
    """Carry the gradient ``dy`` (N, C) of ``reference.dense_target`` back to dense labels, or to λ (N,)."""
    if options.class_weight is not None:
        dy = dy * options.class_weight.to(dy.dtype)
    smoothing = options.label_smoothing
    if target.is_dense():
        return (dy * (1 - smoothing)).to(target.labels.dtype), None
    if target.partner_labels is None or target.lam is None:
        return None, None

    def of_label(labels: Tensor) -> Tensor:
        kept = labels != options.ignore_index
        at_label = dy.gather(1, labels.where(kept, 0).unsqueeze(1)).squeeze(1)
        smooth = smoothing * dy.mean(1) if smoothing else 0.0
        return zero_where(~kept, at_label * (1 - smoothing) + smooth)

    return None, (of_label(target.labels) - of_label(target.partner_labels)).to(target.lam.dtype)


def _target_tangent(
    logits: Tensor, target: RowTarget, options: RowOptions, d_labels: Tensor | None, d_lam: Tensor | None
) -> Tensor | None:
    """The tangent (N, C) of ``reference.dense_target``, which is linear in dense labels and in λ; None for zero."""
    compute = accumulate_dtype(logits.dtype)
    if target.is_dense() and d_labels is not None:
        dy = d_labels.to(compute) * (1 - options.label_smoothing)
        return dy if options.class_weight is None else dy * options.class_weight.to(compute)
    if not target.is_dense() and target.partner_labels is not None and d_lam is not None:
        own, other = (dense_target(logits, RowTarget(y), options) for y in (target.labels, target.partner_labels))
        return d_lam.to(compute).unsqueeze(1) * (own - other)
    return None


class _Slopes(NamedTuple):
    """Of ``ce_entropy``, (N, C) each: y and p, and the derivatives of CE, H and lse in the logits."""

    y: Tensor
    p: Tensor
    ce: Tensor
    entropy: Tensor
    lse: Tensor


def _slopes(logits: Tensor, target: RowTarget, stats: RowStats, options: RowOptions) -> _Slopes:
    z, y = logits.to(stats.lse.dtype), dense_target(logits, target, options)
    if options.sigmoid:
        p = torch.sigmoid(z)
        variance = p * torch.sigmoid(-z)
        return _Slopes(y, p, p - y, -zero_where(variance == 0, z * variance), p)
    log_p = log_softmax(z, stats.lse)
    p = torch.exp(log_p)
    entropy = -zero_where(p == 0, p * (log_p + stats.entropy.unsqueeze(1)))
    return _Slopes(y, p, p * y.sum(1, keepdim=True) - y, entropy, p)


def _curvature(logits: Tensor, slopes: _Slopes, g: list[Tensor], sigmoid: bool) -> Tensor:
    """The derivative of dz_k in z_k with H and lse, which are arguments of ``ce_entropy_backward``, held fixed."""
    g_ce, g_h, g_lse = g
    if sigmoid:
        slope = slopes.p * torch.sigmoid(-logits.to(slopes.p.dtype))
        turn = slope * (1 - 2 * slopes.p)
        return (g_ce + g_lse) * slope - g_h * (slope + zero_where(turn == 0, logits.to(turn.dtype) * turn))
    return slopes.p * (g_ce * slopes.y.sum(1, keepdim=True) + g_lse - g_h) + g_h * slopes.entropy


def ce_entropy_tangents(
    logits: Tensor,
    target: RowTarget,
    stats: RowStats,
    options: RowOptions,
    d_logits: Tensor | None,
    d_labels: Tensor | None,
    d_lam: Tensor | None,
) -> RowOutputs:
    """The tangents of (CE, H, lse), (N,) each, from those of the logits, dense labels and λ; one of None is zero."""
    slopes = _slopes(logits, target, stats, options)
    z = logits.to(slopes.p.dtype)
    dz = torch.zeros_like(z) if d_logits is None else d_logits.to(z.dtype)
    ce, entropy, lse = ((slope * dz).sum(1) for slope in (slopes.ce, slopes.entropy, slopes.lse))
    dy = _target_tangent(logits, target, options, d_labels, d_lam)
    if dy is not None:
        # ∂CE/∂y_k = lse - z_k, and -z_k for sigmoid models; 0·∞ is 0.
        dce = -z if options.sigmoid else stats.lse.unsqueeze(1) - z
        ce = ce + (dy * zero_where((dy == 0) & z.isinf(), dce)).sum(1)
    return RowOutputs(ce, entropy, lse)


def ce_entropy_double_backward(
    v: Tensor, grads: RowGradients, logits: Tensor, target: RowTarget, stats: RowStats, options: RowOptions
) -> dict[str, Tensor | None]:
    """Gradients of ⟨v, ce_entropy_backward(...)⟩, by the name of the argument."""
    slopes = _slopes(logits, target, stats, options)
    v = v.to(slopes.p.dtype)
    g = g_ce, g_h, _ = columns_of(grads, stats.lse)
    dz = v * _curvature(logits, slopes, g, options.sigmoid)
    found = {
        name: None if grad is None else (v * slope).sum(1).to(grad.dtype)
        for (name, grad), slope in zip(grads._asdict().items(), (slopes.ce, slopes.entropy, slopes.lse), strict=True)
    }
    if options.sigmoid:
        dy = -g_ce * v
    else:
        along = (v * slopes.p).sum(1, keepdim=True)
        dy = g_ce * (along - v)
        found.update(entropy=-(g_h * along).squeeze(1), lse=-dz.sum(1))
    d_labels, d_lam = target_gradients(dy, target, options)
    return {**found, "logits": dz.to(logits.dtype), "labels": d_labels, "lam": d_lam}


def ce_entropy_backward_tangent(
    grads: RowGradients,
    logits: Tensor,
    target: RowTarget,
    stats: RowStats,
    options: RowOptions,
    d_grads: RowGradients,
    d_logits: Tensor | None,
    d_stats: RowStats,
    d_labels: Tensor | None,
    d_lam: Tensor | None,
) -> Tensor:
    """The tangent of ``ce_entropy_backward``, (N, C), from those of its arguments; one of None is zero."""
    slopes = _slopes(logits, target, stats, options)
    g = g_ce, g_h, _ = columns_of(grads, stats.lse)
    u_ce, u_h, u_lse = columns_of(d_grads, stats.lse)
    move = torch.zeros_like(slopes.p) if d_logits is None else d_logits.to(slopes.p.dtype)
    dz = u_ce * slopes.ce + u_h * slopes.entropy + u_lse * slopes.lse
    dy = _target_tangent(logits, target, options, d_labels, d_lam)
    if not options.sigmoid:
        d_entropy, d_lse = columns_of(d_stats, stats.lse)
        move = move - d_lse
        dz = dz - g_h * slopes.p * d_entropy
        if dy is not None:
            dz = dz + g_ce * slopes.p * dy.sum(1, keepdim=True)
    dz = dz + move * _curvature(logits, slopes, g, options.sigmoid)
    return (dz if dy is None else dz - g_ce * dy).to(logits.dtype)
