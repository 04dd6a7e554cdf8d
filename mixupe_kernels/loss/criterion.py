"""MixupE's loss: L = η̂ (L_mix + η R), R = w · mean penalty(q̂), q̂ = H - CE   (Zou et al., UAI 2023, eq. 5 and 7-9)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..conventions import IGNORE_INDEX, PENALTIES, accumulate_dtype, constant
from ..ops import reference
from ..target import MixedTarget, Target, as_multilabel, as_rows, as_target
from .terms import ACTIVATIONS


class LossParts(NamedTuple):
    """What a loss was made of, as detached 0-d tensors on the device: reading one synchronises, keeping them does not."""

    mix_loss: Tensor
    reg: Tensor
    eta_hat: Tensor


def _scalar(name: str, value: float | Tensor, logits: Tensor) -> Tensor:
    """A non-negative number as a 0-d tensor of the compute dtype beside the logits."""
    compute = accumulate_dtype(logits.dtype)
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: the loss is not differentiable in it")
        if value.dtype is compute and value.device == logits.device:
            return value
        return value.to(logits.device, compute, non_blocking=True)
    if type(value) is not float:
        value = checks.non_negative(name, value)
    device = logits.device

    def make() -> Tensor:
        return torch.full((), checks.non_negative(name, value), dtype=compute, device=device)

    return constant(("scalar", value, compute, device), make)


def _count_rows(target: Tensor | tuple, logits: Tensor) -> tuple[int, int, Tensor]:
    """(rows of L_mix, rows of R, w) in rows of the flattened logits; a plain target carries L_mix on every row."""
    rows = logits.shape[:-1].numel()
    if not isinstance(target, tuple):
        return rows, 0, _scalar("target.reg_weight", 0.0, logits)
    batch, num_mixed, num_reg = logits.shape[0], target.num_mixed, target.num_reg
    for name, count in (("num_mixed", num_mixed), ("num_reg", num_reg)):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= batch:
            raise ValueError(f"target.{name} must be an int in [0, {batch}], got {count!r}")
    each = rows // batch if batch else 0
    return num_mixed * each, num_reg * each, _scalar("target.reg_weight", target.reg_weight, logits)


class _InplaceLoss(torch.autograd.Function):
    """``mixupe::mixupe_loss`` whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx, logits, *args):
        outputs = ops.below_autograd(ops.mixupe_loss_op, (logits, *args))
        ctx.save_for_backward(logits, *args[:3], *outputs[1:])
        ctx.options = ops.backward_options(*args[5:])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs[:2]

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True cannot be differentiated twice: its backward overwrites the logits"
            )
        logits, *rest = ctx.saved_tensors
        gradient = logits.detach()
        ops.mixupe_loss_backward_out_op(grad, gradient, *rest, *ctx.options, out=gradient)
        # Whoever else saved the logits now gets autograd's error instead of a wrong gradient.
        torch.autograd.graph.increment_version(logits)
        return gradient, *[None] * 12


def _check_inplace(logits: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace_backward must be False for logits that are a leaf: their values would be overwritten")
    if logits.dim() != 2 or logits.stride(-1) != 1:
        raise ValueError(
            "inplace_backward must be False for logits that are not (N, C) with adjacent classes, got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}"
        )


class _Options(NamedTuple):
    """Checked options of the loss; ``operator`` are those its operators take, None where a function is the penalty."""

    penalty: str | Callable[[Tensor], Tensor]
    rescale: bool
    threshold: float
    label_smoothing: float
    sigmoid: bool
    inplace_backward: bool
    operator: tuple | None

    @staticmethod
    def check(penalty, rescale, threshold, label_smoothing, activation, inplace_backward) -> "_Options":
        if inplace_backward and callable(penalty):
            raise ValueError("inplace_backward must be False with a penalty that is a function")
        rescale, threshold = bool(rescale), _check_threshold(threshold)
        smoothing = checks.fraction("label_smoothing", label_smoothing)
        sigmoid = checks.choice("activation", activation, ACTIVATIONS) == "sigmoid"
        operator = None
        if not callable(penalty):
            number = PENALTIES.index(checks.choice("penalty", penalty, PENALTIES))
            operator = (number, threshold, rescale, smoothing, sigmoid)
        return _Options(penalty, rescale, threshold, smoothing, sigmoid, bool(inplace_backward), operator)


def _check_threshold(threshold: float) -> float:
    return checks.number("threshold", threshold, "a number", lambda value: True)


def _loss(
    logits: Tensor, target: Tensor | tuple, eta: Tensor, options: _Options, q: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, parts), by one fused operator, or by the composition where a part of it is the caller's own."""
    if q is None and _is_usual(logits, target, options):
        labels, partner, lam, num_mixed, num_reg, reg_weight = target
        arguments = (labels, partner, lam, eta, reg_weight, num_mixed, num_reg, *options.operator)
        try:
            return ops.MixupELossWithGradient.apply_here(logits, arguments)
        except (RuntimeError, TypeError, ValueError):
            pass  # what was wrong with it, or has to be converted, is found below
    rows = as_rows(logits)
    parts = as_target(target, logits)
    if options.sigmoid:
        as_multilabel(parts)
    num_mixed, num_reg, reg_weight = _count_rows(target, logits)
    learned_target = parts.target.requires_grad or (parts.lam is not None and parts.lam.requires_grad)
    # Of nested transforms, an outer one may differentiate in what the inner one takes for a constant.
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and options.inplace_backward:
        raise ValueError("inplace_backward must be False under a transform of torch.func")
    own_part = q is not None or options.operator is None
    if own_part or transformed or (learned_target and torch.is_grad_enabled()):
        return composed_loss(rows, parts, eta, reg_weight, num_mixed, num_reg, options, q)
    arguments = (*parts, eta, reg_weight, num_mixed, num_reg, *options.operator)
    if options.inplace_backward:
        _check_inplace(logits)
        return ops.call(_InplaceLoss.apply, rows, *arguments)
    if _wants_gradient_now(rows):
        return ops.call(ops.MixupELossWithGradient.apply, rows, arguments)
    return ops.call(ops.mixupe_loss_op, rows, *arguments)[:2]


def _is_usual(logits: Tensor, target: Tensor | tuple, options: _Options) -> bool:
    """Whether to try the operator for a loss with its gradient first, and look at the arguments only where it raises.

    The operator checks all of them but those looked at here. In a step of a small model, whose Python code is never in the
    caches, the checks by name take 2 % of the time.
    """
    if type(target) is not MixedTarget or options.operator is None or options.sigmoid or options.inplace_backward:
        return False
    labels, partner, lam, num_mixed, num_reg, reg_weight = target
    return (
        type(labels) is type(partner) is type(lam) is type(reg_weight) is Tensor
        and labels.is_cpu
        and partner.is_cpu
        and lam.is_cpu
        and reg_weight.is_cpu  # one elsewhere has another kernel
        and type(num_mixed) is type(num_reg) is int
        and labels.dtype is torch.int64
        and logits.dim() == 2
        and lam.shape == labels.shape
        and reg_weight.dim() == 0
        and not lam.requires_grad
        and not reg_weight.requires_grad
        and _wants_gradient_now(logits)
        and not torch._C._functorch.is_functorch_wrapped_tensor(logits)
    )


# Logits that stay in the last-level cache (bytes) have their gradient made with the loss.
_GRADIENT_NOW = 16 << 20


def _wants_gradient_now(rows: Tensor) -> bool:
    """Whether to make the gradient in the forward, for an upstream gradient of 1: the usual case, told without a sync.

    On the CPU this spares the second call of an operator. float16 logits wait for the upstream gradient: a loss
    scaler's factor keeps theirs from underflowing.
    """
    return (
        rows.requires_grad
        and rows.is_cpu
        and rows.nbytes <= _GRADIENT_NOW
        and rows.dtype is not torch.float16
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not checks.has_tangent(rows)
    )


def composed_loss(
    rows: Tensor,
    target: Target,
    eta: Tensor,
    reg_weight: Tensor,
    num_mixed: int,
    num_reg: int,
    options: _Options,
    q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same loss as an expression over ``ce_entropy``: for penalties and q of the caller's own, and learned targets."""
    row_options = (None, options.label_smoothing, IGNORE_INDEX, options.sigmoid)
    ce, entropy, lse = ops.call(ops.ce_entropy_op, rows, *target, *row_options)
    kept = reference.kept_labels(*target)
    kept = torch.ones_like(ce) if kept is None else kept.to(ce.dtype)
    whole = kept[ce.shape[0] - num_reg :] == 1

    def mean(values: Tensor, count: Tensor) -> Tensor:
        return torch.where(count > 0, values.sum() / count.clamp(min=1e-30), 0.0)

    def named_penalty(q: Tensor) -> Tensor:
        if options.penalty == "abs":
            return q.abs()
        return torch.where(q >= options.threshold, 0.0, -q) if options.penalty == "threshold" else -q

    if q is not None:
        checks.tensor("q", q)
        checks.shape("q", q, (q.numel(),))
        checks.same_device("q", q, "logits", rows)
        q, whole = q.to(ce.dtype), torch.ones_like(q, dtype=torch.bool)
    elif options.penalty == "linear_detached":
        # (y - p)ᵀz with y - p constant has the value q̂, no gradient in y, and in z that of q̂ with H constant.
        fixed = Target(*(None if part is None else part.detach() for part in target))
        fixed_ce, fixed_entropy, fixed_lse = ops.call(ops.ce_entropy_op, rows, *fixed, *row_options)
        fixed_rows = (fixed_ce, fixed_entropy.detach(), fixed_lse, fixed.target)
        q = reference.q_hat(*fixed_rows, options.sigmoid, options.label_smoothing)[ce.shape[0] - num_reg :]
    else:
        q = reference.q_hat(ce, entropy, lse, target.target, options.sigmoid, options.label_smoothing)
        q = q[ce.shape[0] - num_reg :]
    value = options.penalty(q) if callable(options.penalty) else named_penalty(q)
    if value.shape != q.shape:
        raise ValueError(f"penalty must return one value for each of {tuple(q.shape)}, got {tuple(value.shape)}")
    mix_loss = mean(ce[:num_mixed], kept[:num_mixed].sum())
    reg = reg_weight * mean(torch.where(whole, value, 0.0), whole.sum().to(ce.dtype))
    total = mix_loss + eta * reg
    eta_hat = torch.ones_like(total)
    if options.rescale:
        eta_hat = torch.where(total == 0, eta_hat, mix_loss.abs() / total.abs()).detach()
    return eta_hat * total, torch.stack([mix_loss, reg, eta_hat]).detach()


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
    inplace_backward: bool = False,
) -> Tensor:
    r"""The loss of MixupE: L = η̂ (L_mix + η R), R = w · mean penalty(q̂), as one fused forward and one fused backward.

    L_mix is the mean cross-entropy of the first ``target.num_mixed`` rows; R is taken on the last ``target.num_reg``,
    with w = ``target.reg_weight`` (eq. 7). η̂ = \|L_mix\| / \|L_mix + η R\| is a constant to autograd (eq. 9), and 1 where
    its denominator is 0. Rows whose label is -100 leave both means; a mean over no rows is 0. For the backward, two
    floats a row are kept beside the arguments (on the CPU, for logits of up to 16 MiB, the gradient itself, made in the
    forward; each thread that calls this with bfloat16 logits keeps up to 4 MiB to make it in).

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
        inplace_backward: write the gradient over the logits instead of into a new tensor: N·C elements less at the
            peak. The logits hold their own gradient afterwards. Autograd refuses to go on if another operation needs
            their values; leaves and second derivatives are refused here.

    Returns:
        0-d loss, float32 (float64 for float64 logits), differentiable any number of times in the logits, and in soft
        targets and λ, under torch.func too, where ``vmap`` loops over what it maps. Forward mode (``jvp``) is refused.

    Raises:
        TypeError, ValueError: as :func:`ce_entropy`, and for an option that is not as stated.
    """
    checks.tensor("logits", logits)
    options = _Options.check(penalty, rescale, threshold, label_smoothing, activation, inplace_backward)
    return _loss(logits, target, _scalar("eta", eta, logits), options)[0]


class MixupELoss(nn.Module):
    """:func:`mixupe_loss` as a criterion, in the place of timm's ``SoftTargetCrossEntropy``.

    Args:
        eta: η >= 0, the regularizer's strength; the paper uses 1e-4 to 0.1, mostly 1e-3. May be set between steps.
        penalty, rescale, threshold, label_smoothing, activation, inplace_backward: as for :func:`mixupe_loss`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.

    Calling it with logits and a target returns the 0-d loss. A third argument ``q`` (n,) takes the place of q̂:
    :func:`exact_q` of the clean rows, which then need not be in the batch (``MixupE(regularize="mixed")`` adds none).
    After a call ``last`` holds its ``mix_loss``, ``reg`` and ``eta_hat`` as detached 0-d tensors on the device.
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
        inplace_backward: bool = False,
    ):
        super().__init__()
        self._eta: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.eta = eta
        self.options = _Options.check(penalty, rescale, threshold, label_smoothing, activation, inplace_backward)
        self._last: list[Tensor] = []  # not an attribute of its own: nn.Module takes 2 µs to set one to a tensor

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
        """``mix_loss``, ``reg`` and ``eta_hat`` of the last call; None before the first, and after one under a transform of
        torch.func."""
        return LossParts(*self._last[0][:3].unbind()) if self._last else None

    def forward(self, logits: Tensor, target: Tensor | tuple, q: Tensor | None = None) -> Tensor:
        checks.tensor("logits", logits)
        key = (logits.device, logits.dtype)
        eta = self._eta.get(key)
        if eta is None:
            compute = accumulate_dtype(logits.dtype)
            eta = torch.full((), self._eta_value, dtype=compute, device=logits.device)
            if not torch._C._are_functorch_transforms_active():
                self._eta[key] = eta
        loss, parts = _loss(logits, target, eta, self.options, q)
        # A transform's tensors are not to be looked at after it.
        self._last[:] = [] if torch._C._are_functorch_transforms_active() else [parts]
        return loss

    def extra_repr(self) -> str:
        return f"eta={self.eta:g}, penalty={self.options.penalty!r}, rescale={self.options.rescale}"
