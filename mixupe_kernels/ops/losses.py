"""ce_entropy and mixupe_loss with their backwards. Per operator: schema, fake, backward."""

import torch
from torch import Tensor

from .. import checks
from ..conventions import accumulate_dtype
from . import double_backward
from .registration import Function, below_autograd, call, define, detached, differentiable


def _ce_entropy_fake(logits, *args, **kwargs):
    compute = accumulate_dtype(logits.dtype)
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
    compute = accumulate_dtype(logits.dtype)
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
