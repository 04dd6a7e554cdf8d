"""ce_entropy and mixupe_loss with their backwards. Per operator: declaration, fake, derivatives."""

from typing import Any

import torch
from torch import Tensor

from ..conventions import accumulate_dtype
from . import double_backward, reference
from .arguments import (
    LossArguments,
    LossBackwardOptions,
    LossStats,
    Parts,
    RowGradients,
    RowOptions,
    RowOutputs,
    RowStats,
    RowTarget,
    Signature,
)
from .registration import (
    apply_untransformed,
    below_autograd,
    call,
    composite,
    define,
    differentiable,
    differentiates_otherwise,
    each_member,
    is_exporting,
    is_transformed,
    keep,
    kept,
    signature_of,
    without_gradient,
)


def _rows_fake(logits, labels, partner_labels=None, lam=None, *_):
    RowTarget(labels, partner_labels, lam).check_device(logits)
    return tuple(logits.new_empty(logits.shape[:1], dtype=accumulate_dtype(logits.dtype)) for _ in range(3))


def _gradient_fake(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _loss_fake(logits, *rest):
    _, entropy, lse = _rows_fake(logits, *rest)
    return lse.new_empty(()), lse.new_empty((len(Parts._fields),)), entropy, lse


ce_entropy_op = define(reference.ce_entropy, _rows_fake)
ce_entropy_backward_op = define(
    reference.ce_entropy_backward, lambda grad_ce, grad_entropy, grad_lse, logits, *_: _gradient_fake(logits)
)
mixupe_loss_op = define(reference.mixupe_loss, _loss_fake)
mixupe_loss_with_gradient_op = without_gradient(
    define(
        reference.mixupe_loss_with_gradient,
        lambda logits, *rest: (*_loss_fake(logits, *rest)[:2], _gradient_fake(logits)),
    )
)
mixupe_loss_backward_op = define(reference.mixupe_loss_backward, lambda grad, logits, *_: _gradient_fake(logits))
mixupe_loss_backward_out_op = define(reference.mixupe_loss_backward_out, lambda *_, out: None)

_ce_entropy, _ce_entropy_backward = signature_of(ce_entropy_op), signature_of(ce_entropy_backward_op)
_loss, _loss_backward = signature_of(mixupe_loss_op), signature_of(mixupe_loss_backward_op)


def ce_entropy(logits: Tensor, target: RowTarget, options: RowOptions) -> RowOutputs:
    """CE, H and lse of each row, differentiable any number of times, in either mode, in the logits, labels and λ."""
    share = target.lam
    if share is not None and target.labels.dim() == 2:
        outputs = ce_entropy(logits, RowTarget(target.labels), options)
        return outputs._replace(ce=reference.zero_where(share == 0, outputs.ce * share))
    return RowOutputs(*call(ce_entropy_op, logits, *target, *options))


def ce_entropy_backward(
    grads: RowGradients, logits: Tensor, stats: RowStats, target: RowTarget, options: RowOptions
) -> Tensor:
    """The gradient in the logits, from those of CE, H and lse; differentiable as ``ce_entropy`` is."""
    return call(ce_entropy_backward_op, *grads, logits, *stats, *target, *options)


# Rows do not depend on each other, so a dimension that vmap maps is more rows.


def _with_rows_folded(
    function: type[torch.autograd.Function], signature: Signature, info: Any, in_dims: tuple, args: tuple
):
    """The vmap rule of an operator on rows: (outputs, their mapped dimensions)."""
    given, dims = signature.Flat(*args), signature.Flat(*in_dims)
    members = info.batch_size

    def folded(value, dim):
        if not isinstance(value, Tensor):
            return value
        value = value.expand(members, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1)

    if dims.class_weight is not None:  # each member weights the classes in its own way
        return each_member(function, info, dims, *given)
    rows = given._make(map(folded, given, dims))._replace(class_weight=given.class_weight)
    sizes = (members, rows.logits.shape[0] // members)
    out = function.apply(*rows)
    if isinstance(out, Tensor):
        return out.unflatten(0, sizes), 0
    return tuple(output.unflatten(0, sizes) for output in out), (0,) * len(out)


@differentiable(ce_entropy_op, "logits", "labels", "lam")
class _CEEntropy(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, *target_and_options = inputs
        _, entropy, lse = output
        keep(ctx, _ce_entropy_backward.Flat(None, None, None, logits, entropy, lse, *target_and_options))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_ce, grad_entropy, grad_lse):
        flat = kept(ctx)
        needed = _ce_entropy.Flat(*ctx.needs_input_grad)
        gradients = {}
        if needed.logits:
            upstream = {"grad_ce": grad_ce, "grad_entropy": grad_entropy, "grad_lse": grad_lse}
            gradients["logits"] = call(ce_entropy_backward_op, *flat._replace(**upstream))
        if grad_ce is not None and (needed.labels or needed.lam):
            _, logits, stats, target, options = _ce_entropy_backward.pack(*flat)
            # ∂CE/∂y_k = lse - z_k, and -z_k for sigmoid models.
            z = logits.to(stats.lse.dtype)
            dy = grad_ce.unsqueeze(1) * (-z if options.sigmoid else stats.lse.unsqueeze(1) - z)
            gradients["labels"], gradients["lam"] = double_backward.target_gradients(dy, target, options)
        return _ce_entropy.gradients(**gradients)

    @staticmethod
    def jvp(given, *tangents):
        _, logits, stats, target, options = _ce_entropy_backward.pack(*given)
        d_logits, d_target, _ = _ce_entropy.pack(*tangents)
        d_target = d_target.labels, d_target.lam
        return tuple(double_backward.ce_entropy_tangents(logits, target, stats, options, d_logits, *d_target))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _with_rows_folded(_CEEntropy, _ce_entropy, info, in_dims, args)


@differentiable(ce_entropy_backward_op, *RowGradients._fields, "logits", *RowStats._fields, "labels", "lam")
class _CEEntropyBackward(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, _ce_entropy_backward.Flat(*inputs))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, v):
        if v is None:
            return _ce_entropy_backward.gradients()
        grads, logits, stats, target, options = _ce_entropy_backward.pack(*kept(ctx))
        found = double_backward.ce_entropy_double_backward(v, grads, logits, target, stats, options)
        return _ce_entropy_backward.gradients(**found)

    @staticmethod
    def jvp(given, *tangents):
        grads, logits, stats, target, options = _ce_entropy_backward.pack(*given)
        d_grads, d_logits, d_stats, d_target, _ = _ce_entropy_backward.pack(*tangents)
        return double_backward.ce_entropy_backward_tangent(
            grads, logits, target, stats, options, d_grads, d_logits, d_stats, d_target.labels, d_target.lam
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        return _with_rows_folded(_CEEntropyBackward, _ce_entropy_backward, info, in_dims, args)


# mixupe_loss. Under a transform of torch.func, in forward mode, and with a learned target the loss is an expression over
# ce_entropy instead (loss/composed.py), so what follows has reverse mode only, in the logits.


def _gradient_of_loss(
    grad: Tensor, logits: Tensor, target: RowTarget, stats: LossStats, options: LossBackwardOptions
) -> Tensor:
    """``mixupe_loss_backward`` for an upstream gradient that may itself be differentiated."""
    rest = (logits, *target, *stats, *options)
    if is_transformed(grad):  # the operator has reverse mode only, and is linear in the upstream gradient
        return call(mixupe_loss_backward_op, torch.ones_like(stats.parts[0]), *rest) * grad
    if not torch.is_grad_enabled():
        return below_autograd(mixupe_loss_backward_op, grad, *rest)
    return call(mixupe_loss_backward_op, grad, *rest)


def _differentiable_gradient(grad: Tensor, logits: Tensor, target: RowTarget, arguments: LossArguments) -> Tensor:
    """The same where the forward left no more than the gradient: a second derivative is one of a function of the logits."""
    _, *stats = below_autograd(mixupe_loss_op, logits, *target, *arguments)
    return _gradient_of_loss(grad, logits, target, LossStats(*stats), arguments.of_backward())


@differentiable(mixupe_loss_op, "logits")
class _Loss(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, arguments = _loss.pack(*inputs)
        _, *stats = output
        keep(ctx, _loss_backward.Flat(None, logits, *target, *stats, *arguments.of_backward()))
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        _, *rest = _loss_backward.pack(*kept(ctx))
        return _loss.gradients(logits=None if grad is None else _gradient_of_loss(grad, *rest))


@differentiable(mixupe_loss_backward_op, "grad", "logits")
class _LossBackward(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, _loss_backward.Flat(*inputs))

    @staticmethod
    def backward(ctx, v):
        """By autograd, through the operator as an expression: entropy and lse are functions of the logits.

        The coefficients are piecewise constant in the logits (the slope of the penalty; η̂ is detached) and linear in the
        upstream gradient.
        """
        grad, logits, target, stats, options = _loss_backward.pack(*kept(ctx))
        with torch.enable_grad():
            grad, logits = map(double_backward.alias, (grad, logits))  # the one may be made of the other
            coefficients = reference.loss_coefficients(grad, target, stats, options)
            rows = ce_entropy(logits, target, options.of_rows())
            dz = ce_entropy_backward(coefficients, logits, RowStats(rows.entropy, rows.lse), target, options.of_rows())
        wanted = {name: value for name, value in (("grad", grad), ("logits", logits)) if value.requires_grad}
        found = torch.autograd.grad(dz, list(wanted.values()), v, create_graph=torch.is_grad_enabled())
        return _loss_backward.gradients(**dict(zip(wanted, found, strict=True)))


class _FusedLoss(torch.autograd.Function):
    """The loss; its parts are appended to a list.

    As an output, parts that have no gradient took 0.8 of 68 µs. The tuples stay whole: ``apply`` would look at each of 13
    arguments, 3 of 41 µs.
    """

    @staticmethod
    def forward(ctx, logits, target, arguments, parts):
        loss, *stats = below_autograd(mixupe_loss_op, logits, *target, *arguments)
        ctx.save_for_backward(logits, *target, *stats)
        ctx.options = arguments.of_backward()
        parts.append(stats[0])
        return loss

    @staticmethod
    def backward(ctx, grad):
        logits, labels, partner_labels, lam, *stats = ctx.saved_tensors
        target, stats = RowTarget(labels, partner_labels, lam), LossStats(*stats)
        return _gradient_of_loss(grad, logits, target, stats, ctx.options), None, None, None


class _InplaceLoss(_FusedLoss):
    """The same, whose backward writes the gradient over the logits."""

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward=True cannot be differentiated twice: its backward overwrites the logits"
            )
        logits, *saved = ctx.saved_tensors
        gradient = logits.detach()
        mixupe_loss_backward_out_op(grad, gradient, *saved, *ctx.options, out=gradient)
        # Whoever else saved the logits now gets autograd's error instead of a wrong gradient.
        torch.autograd.graph.increment_version(logits)
        return gradient, None, None, None


class _LossWithGradient(torch.autograd.Function):
    """The same, with the gradient made in the forward.

    The gradient is no output either: that took 3 of the 84 µs of a forward and backward of 100 rows. It is handed out once, as
    its new owner may write to it; another backward makes another.
    """

    @staticmethod
    def forward(ctx, logits, target, arguments, parts):
        loss, of_loss, ctx.gradient = mixupe_loss_with_gradient_op(logits, *target, *arguments)
        ctx.save_for_backward(logits, *target, arguments.eta, arguments.reg_weight)
        ctx.arguments = arguments
        parts.append(of_loss)
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():
            logits, labels, partner_labels, lam, *_ = ctx.saved_tensors  # none rewritten since, autograd sees to it
            target, arguments = RowTarget(labels, partner_labels, lam), ctx.arguments
            if torch.is_grad_enabled():
                return _differentiable_gradient(grad, logits, target, arguments), None, None, None
            _, _, gradient = mixupe_loss_with_gradient_op(logits, *target, *arguments)  # the bits of the first
        return gradient if is_one(grad) else gradient * grad, None, None, None


def is_one(grad: Tensor) -> bool:
    """Whether a loss's upstream gradient is 1, as ``loss.backward()`` makes it; False where it cannot be told.

    A tensor of a tracer has no value, one that is mapped has many, and one on a device would have to be waited for.
    """
    if type(grad) is not Tensor or not grad.is_cpu or differentiates_otherwise():
        return False
    try:
        return grad.item() == 1
    except RuntimeError:
        return False  # mapped by is_grads_batched


class _CompiledLoss(torch.autograd.Function):
    """(loss, parts) in a graph for the CPU: one operator makes the gradient, too, and the compiler fuses the upstream one into
    what comes next. Two operators and what the second reads took a tenth of a step of a small network.
    """

    @staticmethod
    def forward(ctx, *flat):
        loss, parts, gradient = mixupe_loss_with_gradient_op(*flat)
        logits, target, arguments = _loss.pack(*flat)
        ctx.save_for_backward(logits, *target, arguments.eta, arguments.reg_weight, gradient)
        ctx.arguments = arguments
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx, grad, _):
        logits, labels, partner_labels, lam, _, _, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # compilers that differentiate ahead have it off, and keep the gradient alone
            gradient = _differentiable_gradient(grad, logits, RowTarget(labels, partner_labels, lam), ctx.arguments)
        else:
            gradient = gradient * grad
        return _loss.gradients(logits=gradient)


def compiled_mixupe_loss(logits: Tensor, target: RowTarget, arguments: LossArguments) -> tuple[Tensor, Tensor]:
    return _CompiledLoss.apply(logits, *target, *arguments)


# Traced by Dynamo, the Function's backward would have gradients off, and lose second derivatives without a word.
_compiled_loss = composite(compiled_mixupe_loss)

_apply, _apply_inplace, _apply_with_gradient = map(apply_untransformed, (_FusedLoss, _InplaceLoss, _LossWithGradient))

# Logits that stay in the last-level cache (bytes) have their gradient made with the loss.
_GRADIENT_NOW = 16 << 20


def fused_loss(
    logits: Tensor, target: RowTarget, arguments: LossArguments, inplace_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss, parts) by one operator, differentiable in the logits. Callers have asked ``is_transformed(logits)``.

    On the CPU the gradient is made with the loss, for an upstream gradient of 1: the usual case, told without waiting for a
    device. float16 logits wait for the upstream gradient: a loss scaler's factor keeps theirs from underflowing.
    """
    if torch.compiler.is_compiling():
        differentiated = logits.requires_grad and torch.is_grad_enabled() and not is_exporting()
        if differentiated and logits.device.type == "cpu" and logits.dtype is not torch.float16:
            return _compiled_loss(logits, *target, *arguments)
        return mixupe_loss_op(logits, *target, *arguments)[:2]
    if not logits.requires_grad or not torch.is_grad_enabled():
        return below_autograd(mixupe_loss_op, logits, *target, *arguments)[:2]
    now = logits.is_cpu and logits.dtype is not torch.float16 and logits.nbytes <= _GRADIENT_NOW
    apply = _apply_inplace if inplace_backward else _apply_with_gradient if now else _apply
    parts: list[Tensor] = []
    return apply(logits, target, arguments, parts), parts[0]
