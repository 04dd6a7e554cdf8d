"""ce_entropy and mixupe_loss with their backwards. Per operator: schema, public function, fake, backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, double_backward, reference
from .registration import Function, below_autograd, call, define, detached, differentiable


class CEEntropy(NamedTuple):
    """Per row: cross-entropy, entropy of the prediction, log-sum-exp of the logits."""

    ce: Tensor
    entropy: Tensor
    lse: Tensor


def _ce_entropy_fake(logits, *args, **kwargs):
    compute = reference.accumulate_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[:1], dtype=compute) for _ in range(3))


_TARGET_SCHEMA = (
    "Tensor target, Tensor? partner=None, Tensor? lam=None, Tensor? class_weight=None, "
    "float label_smoothing=0.0, int ignore_index=-100, bool sigmoid=False"
)
ce_entropy_op = define(f"ce_entropy(Tensor logits, {_TARGET_SCHEMA}) -> (Tensor, Tensor, Tensor)", _ce_entropy_fake)
ce_entropy_backward_op = define(
    "ce_entropy_backward(Tensor? grad_ce, Tensor? grad_entropy, Tensor? grad_lse, Tensor logits, Tensor entropy, "
    f"Tensor lse, {_TARGET_SCHEMA}) -> Tensor",
    lambda grad_ce, grad_entropy, grad_lse, logits, *args, **kwargs: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    ),
)


class Target(NamedTuple):
    """A target as the operators take it: (N,) indices, two of them with ``lam``, or dense (N, C)."""

    target: Tensor
    partner: Tensor | None = None
    lam: Tensor | None = None


def _needs_nothing(labels, partner, lam, logits: Tensor) -> bool:
    """Whether a MixedTarget already is what the operators take: the case of every step, so it is asked first (2 µs)."""
    return (
        isinstance(labels, Tensor)
        and isinstance(partner, Tensor)
        and isinstance(lam, Tensor)
        and labels.dtype is partner.dtype is torch.int64
        and lam.dtype is reference.accumulate_dtype(logits.dtype)
        and labels.shape == partner.shape == lam.shape == logits.shape[:-1]
        and labels.dim() == 1
        and labels.device == partner.device == lam.device == logits.device
    )


def as_target(target: Tensor | tuple, logits: Tensor, name: str = "target") -> Target:
    """Check a MixedTarget, class indices or soft targets against ``logits`` (..., C), and flatten to rows.

    Soft labels of a MixedTarget are mixed here, λ·labels + (1 - λ)·partner_labels: one (N, C) tensor.
    """
    compute, leading = reference.accumulate_dtype(logits.dtype), logits.shape[:-1]
    if not isinstance(target, tuple):
        checks.tensor(name, target)
        checks.same_device(name, target, "logits", logits)
        if target.is_floating_point():
            checks.shape(name, target, logits.shape)
            return Target(target.to(compute).reshape(-1, logits.shape[-1]))
        checks.dtype(name, target, (torch.int64,))
        checks.shape(name, target, leading)
        return Target(target.reshape(-1))
    labels, partner, lam = target[:3]
    if _needs_nothing(labels, partner, lam, logits):
        return Target(labels, partner, lam)
    for part, value in ((f"{name}.labels", labels), (f"{name}.partner_labels", partner), (f"{name}.lam", lam)):
        checks.tensor(part, value)
        checks.same_device(part, value, "logits", logits)
    checks.shape(f"{name}.partner_labels", partner, labels.shape)
    checks.shape(f"{name}.lam", lam, labels.shape[:1])
    lam = lam.to(compute)
    if labels.is_floating_point():
        checks.shape(f"{name}.labels", labels, logits.shape)
        weight = lam.view(-1, *[1] * (labels.dim() - 1))
        mixed = torch.lerp(partner.to(compute), labels.to(compute), weight)
        return Target(mixed.reshape(-1, logits.shape[-1]))
    checks.dtype(f"{name}.labels", labels, (torch.int64,))
    checks.dtype(f"{name}.partner_labels", partner, (torch.int64,))
    checks.shape(f"{name}.labels", labels, leading)
    if labels.dim() > 1:
        lam = lam.view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)
    return Target(labels.reshape(-1), partner.reshape(-1), lam.reshape(-1))


def as_rows(logits: Tensor) -> Tensor:
    """Check ``logits`` (..., C) and view them as (N, C)."""
    checks.tensor("logits", logits)
    checks.dtype("logits", logits, checks.LOGITS_DTYPES)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., C) with C >= 1, got {tuple(logits.shape)}")
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def ce_entropy(
    logits: Tensor,
    target: Tensor | tuple,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
) -> CEEntropy:
    """Cross-entropy, entropy of the softmax and log-sum-exp of each row, in one pass over the logits.

    MixupE's q̂ (Zou et al., 2023, eq. 5) is entropy - ce; plain mixup, RegMixup, the confidence penalty and z-loss are
    other one-line expressions of the three. All are differentiable, any number of times, in the logits, in soft
    targets and in λ, under torch.func too, where ``vmap`` loops over what it maps; for the backward two floats a row are
    kept beside the arguments. Forward mode (``jvp``) is refused.

    Args:
        logits: (..., C) of dtype float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
            Rows need not be adjacent; a last dimension that is not contiguous is copied.
        target: :class:`MixedTarget`, (...) int64 class indices, or (..., C) soft targets (copied to float32 unless they
            are). They need not sum to 1.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: label that adds nothing: a row of such labels only has ce 0. Index targets only.
        class_weight: (C,) weight of each class in ce, as ``weight`` in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        ``(ce, entropy, lse)``, each of shape (...) in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, device or number, or a label outside [0, C). On CUDA, labels are checked on the
            device, without synchronising.
    """
    rows = as_rows(logits)
    parts = as_target(target, logits)
    if class_weight is not None:
        checks.tensor("class_weight", class_weight)
        checks.shape("class_weight", class_weight, logits.shape[-1:])
        checks.same_device("class_weight", class_weight, "logits", logits)
        class_weight = class_weight.to(reference.accumulate_dtype(logits.dtype))
    smoothing = checks.fraction("label_smoothing", label_smoothing)
    outputs = call(ce_entropy_op, rows, *parts, class_weight, smoothing, ignore_index, False)
    return CEEntropy(*(output.view(logits.shape[:-1]) for output in outputs))


class BCEEntropy(NamedTuple):
    """Per row, summed over the classes: binary cross-entropy, entropy of the sigmoids."""

    ce: Tensor
    entropy: Tensor


def bce_entropy(logits: Tensor, target: Tensor | tuple) -> BCEEntropy:
    """Binary cross-entropy and entropy of each row of a sigmoid (multi-label) model, summed over its classes.

    BCE_i = Σ_k softplus(z_k) - y_k z_k and H_i = Σ_k softplus(z_k) - σ(z_k) z_k, so that again q̂ = entropy - ce
    (MixupE, eq. 5 with h = log(1 + e^f)).

    Args:
        logits: (..., C), as for :func:`ce_entropy`.
        target: (..., C) floating point, or a :class:`MixedTarget` with such labels.

    Returns:
        ``(ce, entropy)``, each of shape (...) in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: as :func:`ce_entropy`; class indices are refused.
    """
    rows = as_rows(logits)
    parts = as_multilabel(as_target(target, logits))
    ce, entropy, _ = call(ce_entropy_op, rows, *parts, None, 0.0, reference.IGNORE_INDEX, True)
    return BCEEntropy(ce.view(logits.shape[:-1]), entropy.view(logits.shape[:-1]))


def as_multilabel(target: Target) -> Target:
    if target.target.dim() != 2:
        raise TypeError("target must be floating point (..., C) for a sigmoid model, got class indices")
    return target


@differentiable
class _CEEntropy(Function):
    operator = ce_entropy_op

    @staticmethod
    def forward(ctx, logits, target, partner, lam, class_weight, *options):
        ce, entropy, lse = below_autograd(ce_entropy_op, (logits, target, partner, lam, class_weight, *options))
        ctx.save_for_backward(logits, entropy, lse, target, partner, lam, class_weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return ce, entropy, lse

    @staticmethod
    def backward(ctx, grad_ce, grad_entropy, grad_lse):
        logits, entropy, lse, *target = ctx.saved_tensors
        dlogits = dtarget = dlam = None
        if ctx.needs_input_grad[0]:
            gradients = (grad_ce, grad_entropy, grad_lse)
            dlogits = call(ce_entropy_backward_op, *gradients, logits, entropy, lse, *target, *ctx.options)
        if grad_ce is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[3]):
            # ∂CE/∂y_k = lse - z_k, and -z_k for sigmoid models.
            z, (smoothing, ignore_index, sigmoid) = logits.to(lse.dtype), ctx.options
            dy = grad_ce.unsqueeze(1) * (-z if sigmoid else lse.unsqueeze(1) - z)
            dtarget, dlam = double_backward.target_gradients(dy, *target, smoothing, ignore_index)
        return dlogits, dtarget, None, dlam, None, None, None, None


@differentiable
class _CEEntropyBackward(Function):
    operator = ce_entropy_backward_op

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:10])
        ctx.options = args[10:]
        return below_autograd(ce_entropy_backward_op, args)

    @staticmethod
    def backward(ctx, v):
        return *double_backward.ce_entropy_double_backward(v, *ctx.saved_tensors, *ctx.options), None, None, None


# mixupe_loss: the whole loss as one operator, its gradient as another, and both at once


def _mixupe_loss_fake(logits, *args, **kwargs):
    compute = reference.accumulate_dtype(logits.dtype)
    return tuple(logits.new_empty(size, dtype=compute) for size in ((), (5,), *[logits.shape[:1]] * 2))


def _gradient_fake(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_LOSS_SCHEMA = (
    "(Tensor logits, Tensor target, Tensor? partner, Tensor? lam, Tensor eta, Tensor reg_weight, "
    "int num_mixed, int num_reg, int penalty=0, float threshold=1.0, bool rescale=True, float label_smoothing=0.0, "
    "bool sigmoid=False)"
)
mixupe_loss_op = define(f"mixupe_loss{_LOSS_SCHEMA} -> (Tensor, Tensor, Tensor, Tensor)", _mixupe_loss_fake)
mixupe_loss_with_gradient_op = detached(
    define(
        f"mixupe_loss_with_gradient{_LOSS_SCHEMA} -> (Tensor, Tensor, Tensor)",
        lambda logits, *args, **kwargs: (*_mixupe_loss_fake(logits)[:2], _gradient_fake(logits)),
    )
)
_LOSS_BACKWARD_SCHEMA = (
    "Tensor grad, Tensor logits, Tensor target, Tensor? partner, Tensor? lam, Tensor parts, Tensor signed_entropy, "
    "Tensor lse, int num_mixed, int penalty=0, float label_smoothing=0.0, bool sigmoid=False"
)
mixupe_loss_backward_op = define(
    f"mixupe_loss_backward({_LOSS_BACKWARD_SCHEMA}) -> Tensor",
    lambda grad, logits, *args, **kwargs: _gradient_fake(logits),
)
mixupe_loss_backward_out_op = define(
    f"mixupe_loss_backward_out({_LOSS_BACKWARD_SCHEMA}, *, Tensor(a!) out) -> ()", lambda *args, **kwargs: None
)


def backward_options(num_mixed, num_reg, penalty, threshold, rescale, *tail) -> tuple:
    """Those options of the loss that its backward takes: the rest is in ``parts`` and ``signed_entropy``."""
    return num_mixed, penalty, *tail


@differentiable
class _MixupELoss(Function):
    operator = mixupe_loss_op
    inputs = ("logits",)

    @staticmethod
    def forward(ctx, logits, rest):
        outputs = below_autograd(mixupe_loss_op, (logits, *rest))
        ctx.save_for_backward(logits, *rest[:3], *outputs[1:])
        ctx.options = backward_options(*rest[5:])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        dlogits = None
        if grad is not None:
            dlogits = call(mixupe_loss_backward_op, grad, *ctx.saved_tensors, *ctx.options)
        return dlogits, None


class MixupELossWithGradient(Function):
    """(loss, parts), with the gradient made in the forward.

    The gradient is not a third output: autograd's care for one took 3 of the 84 µs of a forward and backward of 100 rows.
    """

    @staticmethod
    def forward(ctx, logits, rest):
        loss, parts, gradient = mixupe_loss_with_gradient_op(logits, *rest)
        ctx.save_for_backward(gradient, logits, *rest[:5])
        ctx.options = rest[5:]
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx, grad, _):
        dlogits = None
        if grad is not None and torch.is_grad_enabled():
            # create_graph=True: what is differentiated again is a function of the logits, which the gradient is not.
            args = (*ctx.saved_tensors[1:], *ctx.options)
            _, *saved = below_autograd(mixupe_loss_op, args)
            dlogits = call(mixupe_loss_backward_op, grad, *args[:4], *saved, *backward_options(*ctx.options))
        elif grad is not None:
            dlogits = ctx.saved_tensors[0]
            if not _is_one(grad):
                dlogits = dlogits * grad
        return dlogits, None


def _is_one(grad: Tensor) -> bool:
    """Whether a loss's upstream gradient is 1, as ``loss.backward()`` makes it; False where it cannot be told.

    A tensor of a tracer has no value, one of vmap has many, and one on a device would have to be waited for.
    """
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad)
    return type(grad) is Tensor and not batched and grad.is_cpu and grad.item() == 1 and not checks.has_tangent(grad)


@differentiable
class _MixupELossBackward(Function):
    operator = mixupe_loss_backward_op

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:8])
        ctx.options = args[8:]
        return below_autograd(mixupe_loss_backward_op, args)

    @staticmethod
    def backward(ctx, v):
        return *double_backward.mixupe_loss_double_backward(v, *ctx.saved_tensors, *ctx.options), *[None] * 10
