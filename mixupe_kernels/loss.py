"""MixupE's loss: L = η̂ (L_mix + η R), R = w · mean penalty(q̂), q̂ = H - CE   (Zou et al., UAI 2023, eq. 5 and 7-9)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import checks, ops, reference

ACTIVATIONS = ("softmax", "sigmoid")


def q_hat(logits: Tensor, target: Tensor | tuple, *, activation: str = "softmax") -> Tensor:
    """q̂ = (y - p)ᵀz of each row, the first-order term of mixup at clean rows (MixupE, eq. 5).

    Args:
        logits: (..., C) of dtype float32, float64, bfloat16 or float16.
        target: :class:`MixedTarget`, (...) class indices or (..., C) soft targets, which need not sum to 1; floating
            point for ``"sigmoid"``.
        activation: p = ``"softmax"`` or, for multi-label models, ``"sigmoid"`` of the logits.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in the logits and soft targets.

    Raises:
        TypeError, ValueError: as :func:`ce_entropy`, or for an unknown activation.
    """
    sigmoid = checks.choice("activation", activation, ACTIVATIONS) == "sigmoid"
    rows = ops.as_rows(logits)
    target = ops.as_target(target, logits)
    if sigmoid:
        ops.as_multilabel(target)
    outputs = ops._call(ops.ce_entropy_op, rows, *target, None, 0.0, reference.IGNORE_INDEX, sigmoid)
    return reference.q_hat(*outputs, target.target, sigmoid).view(logits.shape[:-1])


class LossParts(NamedTuple):
    """What a loss was made of, as detached 0-d tensors on the device: reading one synchronises, keeping them does not."""

    mix_loss: Tensor
    reg: Tensor
    eta_hat: Tensor


def _scalar(name: str, value: float | Tensor, logits: Tensor) -> Tensor:
    """A non-negative number as a 0-d tensor of the compute dtype beside the logits."""
    compute = reference.accumulate_dtype(logits.dtype)
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: the loss is not differentiable in it")
        return value.to(logits.device, compute, non_blocking=True)
    return torch.full((), checks.non_negative(name, value), dtype=compute, device=logits.device)


def _loss(
    logits: Tensor,
    target: Tensor | tuple,
    eta: Tensor,
    penalty: str | Callable[[Tensor], Tensor],
    threshold: float,
    rescale: bool,
    label_smoothing: float,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, parts) of checked options."""
    rows = ops.as_rows(logits)
    parts = ops.as_target(target, logits)
    if sigmoid:
        ops.as_multilabel(parts)
    batch = max(logits.shape[0], 1)
    each = rows.shape[0] // batch if logits.dim() > 1 else 1
    num_mixed, num_reg, reg_weight = target[3:6] if isinstance(target, tuple) else (batch, 0, 0.0)
    num_mixed, num_reg = (min(int(count) * each, rows.shape[0]) for count in (num_mixed, num_reg))
    reg_weight = _scalar("target.reg_weight", reg_weight, logits)
    differentiable_target = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in parts
    )
    if callable(penalty) or differentiable_target:
        return composed_loss(
            rows, parts, eta, reg_weight, num_mixed, num_reg, penalty, threshold, rescale, label_smoothing, sigmoid
        )
    loss, loss_parts, *_ = ops._call(
        ops.mixupe_loss_op, rows, *parts, eta, reg_weight, num_mixed, num_reg,
        reference.PENALTIES.index(penalty), threshold, rescale, label_smoothing, sigmoid,
    )  # fmt: skip
    return loss, loss_parts


def composed_loss(
    rows, parts, eta, reg_weight, num_mixed, num_reg, penalty, threshold, rescale, label_smoothing, sigmoid
) -> tuple[Tensor, Tensor]:
    """The same loss as an expression over ``ce_entropy``: for penalties of the caller's own and learned targets."""
    options = (None, label_smoothing, reference.IGNORE_INDEX, sigmoid)
    ce, entropy, lse = ops._call(ops.ce_entropy_op, rows, *parts, *options)
    kept = reference.kept_labels(*parts)
    kept = torch.ones_like(ce) if kept is None else kept.to(ce.dtype)
    first_reg = ce.shape[0] - num_reg
    whole = kept[first_reg:] == 1

    def mean(values: Tensor, count: Tensor) -> Tensor:
        return torch.where(count > 0, values.sum() / count.clamp(min=1e-30), 0.0)

    mix_loss = mean(ce[:num_mixed], kept[:num_mixed].sum())
    if penalty == "linear_detached":
        # -(y - p)ᵀz with y - p constant has CE's gradient, and the value -q̂.
        fixed = ops.Target(*(None if part is None else part.detach() for part in parts))
        constant = ops._call(ops.ce_entropy_op, rows, *fixed, *options)
        value = (
            constant[0] - (constant[0] + reference.q_hat(*constant, fixed.target, sigmoid, label_smoothing)).detach()
        )
        value = value[first_reg:]
    else:
        q = reference.q_hat(ce, entropy, lse, parts.target, sigmoid, label_smoothing)[first_reg:]
        named = {"abs": torch.abs, "threshold": lambda q: torch.where(q >= threshold, torch.zeros_like(q), -q)}
        value = named.get(penalty, penalty)(q)
        if value.shape != q.shape:
            raise ValueError(f"penalty must return one value for each of {tuple(q.shape)}, got {tuple(value.shape)}")
    reg = reg_weight * mean(torch.where(whole, value, torch.zeros_like(value)), whole.sum().to(ce.dtype))
    total = mix_loss + eta * reg
    eta_hat = torch.ones_like(total)
    if rescale:
        eta_hat = torch.where(total == 0, eta_hat, mix_loss.abs() / total.abs()).detach()
    return eta_hat * total, torch.stack([mix_loss, reg, eta_hat]).detach()


def _check_penalty(penalty: str | Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    return penalty if callable(penalty) else checks.choice("penalty", penalty, reference.PENALTIES)


def _check_threshold(threshold: float) -> float:
    return checks.number("threshold", threshold, "a number", lambda value: True)


def mixupe_loss(
    logits: Tensor,
    target: Tensor | tuple,
    *,
    eta: float | Tensor,
    penalty: str | Callable[[Tensor], Tensor] = "abs",
    rescale: bool = True,
    threshold: float = 1.0,
    label_smoothing: float = 0.0,
    activation: str = "softmax",
) -> Tensor:
    r"""The loss of MixupE: L = η̂ (L_mix + η R), R = w · mean penalty(q̂), as one fused forward and one fused backward.

    L_mix is the mean cross-entropy of the first ``target.num_mixed`` rows; R is taken on the last ``target.num_reg``,
    with w = ``target.reg_weight`` (eq. 7). η̂ = \|L_mix\| / \|L_mix + η R\| is a constant to autograd (eq. 9), and 1 where
    its denominator is 0. Rows whose label is -100 leave both means; a mean over no rows is 0. For the backward, three
    floats a row are kept beside the arguments.

    Args:
        logits: (N, ..., C) of dtype float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
        target: :class:`MixedTarget`; class indices or soft targets stand for plain cross-entropy on every row.
        eta: η >= 0, a number or a 0-d tensor on the device (which a CUDA graph reads afresh at every replay).
        penalty: ``"abs"``, eq. 7; ``"threshold"``, R = -w·Σ_{q̂ < t} q̂ / n, or ``"linear_detached"``,
            R = -w·mean((y - p).detach()ᵀz), which the authors' public code runs as versions 3 and 4; or a function of
            the (n,) values q̂ that returns (n,) values to average.
        rescale: False leaves η̂ at 1.
        threshold: t of ``"threshold"``.
        label_smoothing: in [0, 1]; of both terms.
        activation: ``"softmax"``, or ``"sigmoid"`` for multi-label models with floating-point labels, where
            cross-entropy is the sum over classes of the binary ones.

    Returns:
        0-d loss, float32 (float64 for float64 logits), differentiable any number of times in the logits, and in soft
        targets and λ.

    Raises:
        TypeError, ValueError: as :func:`ce_entropy`, and for an option that is not as stated.
    """
    checks.tensor("logits", logits)
    sigmoid = checks.choice("activation", activation, ACTIVATIONS) == "sigmoid"
    smoothing = checks.fraction("label_smoothing", label_smoothing)
    penalty, threshold = _check_penalty(penalty), _check_threshold(threshold)
    eta = _scalar("eta", eta, logits)
    return _loss(logits, target, eta, penalty, threshold, rescale, smoothing, sigmoid)[0]


class MixupELoss(nn.Module):
    """:func:`mixupe_loss` as a criterion, in the place of timm's ``SoftTargetCrossEntropy``.

    Args:
        eta: η >= 0, the regularizer's strength; the paper uses 1e-4 to 0.1, mostly 1e-3. May be set between steps.
        penalty, rescale, threshold, label_smoothing, activation: as for :func:`mixupe_loss`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.

    Calling it with logits and a target returns the 0-d loss. ``last`` then holds ``mix_loss``, ``reg`` and ``eta_hat`` of
    that call as detached 0-d tensors on the device.
    """

    def __init__(
        self,
        eta: float = 1e-3,
        penalty: str | Callable[[Tensor], Tensor] = "abs",
        *,
        rescale: bool = True,
        threshold: float = 1.0,
        label_smoothing: float = 0.0,
        activation: str = "softmax",
    ):
        super().__init__()
        self._eta: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.eta = eta
        self.penalty = _check_penalty(penalty)
        self.rescale = bool(rescale)
        self.threshold = _check_threshold(threshold)
        self.label_smoothing = checks.fraction("label_smoothing", label_smoothing)
        self.activation = checks.choice("activation", activation, ACTIVATIONS)
        self._parts: Tensor | None = None

    @property
    def eta(self) -> float:
        """η. Setting it rewrites the tensors that steps already captured in CUDA graphs read."""
        return self._eta_value

    @eta.setter
    def eta(self, value: float) -> None:
        self._eta_value = checks.non_negative("eta", value)
        for tensor in self._eta.values():
            tensor.fill_(self._eta_value)

    @property
    def last(self) -> LossParts | None:
        """``mix_loss``, ``reg`` and ``eta_hat`` of the last call; None before the first."""
        return None if self._parts is None else LossParts(*self._parts[:3].unbind())

    def forward(self, logits: Tensor, target: Tensor | tuple) -> Tensor:
        checks.tensor("logits", logits)
        key = (logits.device, reference.accumulate_dtype(logits.dtype))
        eta = self._eta.get(key)
        if eta is None:
            eta = self._eta[key] = _scalar("eta", self._eta_value, logits)
        sigmoid = self.activation == "sigmoid"
        loss, self._parts = _loss(
            logits, target, eta, self.penalty, self.threshold, self.rescale, self.label_smoothing, sigmoid
        )
        return loss

    def extra_repr(self) -> str:
        return f"eta={self.eta:g}, penalty={self.penalty!r}, rescale={self.rescale}"
