"""``torch.ops.mixupe.*``: per operator its schema, public function, fake, backward and registration, in that order.

Schemas are declared once, here. The reference is registered for every device, so that each operator exists with
nothing compiled; ``backends`` adds faster kernels under the same names and the dispatcher picks one.

Autograd is registered as a plain ``torch.autograd.Function`` on the Autograd key: ``torch.library.register_autograd``
does the same at twice the cost a call (66 against 32 µs for a forward and backward of three small outputs, torch 2.13).
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, double_backward, reference

library = torch.library.Library("mixupe", "DEF")


def _define(schema: str, fake: Callable | None = None) -> Callable:
    """Declare an operator whose reference is the function of the same name; return its overload."""
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"mixupe::{name}", fake, lib=library)
    return getattr(torch.ops.mixupe, name).default


def _differentiable(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Register ``function`` on the Autograd key of its ``operator``."""
    operator = function.operator
    name = operator._schema.name.split("::")[1]
    # The dispatcher drops trailing arguments that equal their defaults; backward counts on all of them.
    defaults = [argument.default_value for argument in operator._schema.arguments]

    def kernel(*args):
        args = (*args, *defaults[len(args) :])
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        return _below_autograd(operator, args)

    library.impl(name, kernel, "Autograd")
    return function


def _below_autograd(operator: Callable, args: tuple) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _call(operator: Callable, *args) -> Any:
    try:
        return operator(*args)
    except RuntimeError as error:
        raise checks.translate(error) from None


def _as_lam(lam: Tensor | float, like: Tensor, rows: int) -> Tensor:
    """λ as a tensor of the compute dtype on ``like``'s device: 0-d, or one per row."""
    compute = reference.accumulate_dtype(like.dtype)
    if not isinstance(lam, Tensor):
        return torch.full((), checks.fraction("lam", lam), dtype=compute, device=like.device)
    checks.dtype("lam", lam, checks.LOGITS_DTYPES)
    if lam.dim():
        checks.shape("lam", lam, (rows,))
        checks.same_device("lam", lam, "x", like)
    return lam.to(like.device, compute)


# mix --------------------------------------------------------------------------------------------------------------


def _mix_fake(x, partner, lam, rows=None, scale=None, shift=None, dtype=None, memory_format=None):
    size = x.shape if rows is None else (rows.shape[0], *x.shape[1:])
    memory_format = memory_format or reference.row_format(x)
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


mix_op = _define(
    "mix(Tensor x, Tensor? partner, Tensor lam, Tensor? rows=None, Tensor? scale=None, Tensor? shift=None, "
    "ScalarType? dtype=None, MemoryFormat? memory_format=None) -> Tensor",
    _mix_fake,
)
mix_out_op = _define(
    "mix_out(Tensor x, Tensor? partner, Tensor lam, Tensor? rows=None, Tensor? scale=None, Tensor? shift=None, *, "
    "Tensor(a!) out) -> ()",
    lambda *args, **kwargs: None,
)


def mix(x: Tensor, partner: Tensor | str, lam: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    r"""Mix each sample of a batch with its partner: :math:`\tilde x_i = λ_i x_i + (1 - λ_i) x_{partner(i)}`.

    Mixup (Zhang et al., 2018), eq. 1, in one pass. A sample of weight 0 is not read, so λ = 1 copies exactly.
    Differentiable, any number of times, in ``x`` and ``lam``.

    Args:
        x: (B, ...) of dtype float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
        partner: (B,) int64 in [0, B), or ``"flip"`` for partner(i) = B - 1 - i.
            (B, K) int64 mixes K samples instead, with one weight for each in ``lam``.
        lam: weight of the own sample in [0, 1]: a float, a 0-d tensor or (B,); with a (B, K) partner, (B, K) weights.
        out: buffer to write, of x's shape and device (any of the dtypes above). With ``"flip"`` it may be ``x`` itself,
            which is then mixed in place. Not differentiable, as everywhere in PyTorch.

    Returns:
        (B, ...) of x's dtype, channels_last where x is.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape or device, a partner outside [0, B), λ outside [0, 1] or NaN. On CUDA, values
            are checked by device-side asserts, which report later.
    """
    checks.tensor("x", x)
    checks.dtype("x", x, checks.LOGITS_DTYPES)
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    if isinstance(partner, str):
        checks.choice("partner", partner, ("flip",))
        partner = None
    else:
        checks.tensor("partner", partner)
        checks.dtype("partner", partner, (torch.int64,))
        checks.same_device("partner", partner, "x", x)
        if partner.dim() == 2:
            return _mix_many(x, partner, lam, out)
        checks.shape("partner", partner, x.shape[:1])
    lam = _as_lam(lam, x, x.shape[0])
    if out is None:
        return _call(mix_op, x, partner, lam)
    check_out(out, x.shape, x)
    try:
        mix_out_op(x, partner, lam, out=out)
    except RuntimeError as error:
        raise checks.translate(error) from None
    return out


def check_out(out: Tensor, size: tuple[int, ...], x: Tensor) -> None:
    checks.tensor("out", out)
    checks.shape("out", out, size)
    checks.dtype("out", out, checks.LOGITS_DTYPES)
    checks.same_device("out", out, "x", x)


def _mix_many(x: Tensor, partner: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    checks.shape("partner", partner, (x.shape[0], partner.shape[1]))
    checks.tensor("lam", weight)
    checks.dtype("lam", weight, checks.LOGITS_DTYPES)
    checks.shape("lam", weight, partner.shape)
    checks.same_device("lam", weight, "x", x)
    if out is not None:
        raise ValueError("out must be None with a (B, K) partner, got a tensor")
    rows, terms = partner.shape
    offsets = torch.arange(0, rows * terms + 1, max(terms, 1), device=x.device)[: rows + 1]
    if terms == 0:
        offsets = offsets.new_zeros(rows + 1)
    weight = weight.to(reference.accumulate_dtype(x.dtype)).reshape(-1)
    return _call(gather_sum_op, x, partner.reshape(-1), weight, offsets)


def _transpose(destination: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(order, offsets) that list, for each j < size, the t with destination_t = j, ascending in t."""
    ascending, order = destination.sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(size + 1, device=destination.device))


def _per_channel(grad: Tensor, scale: Tensor | None) -> Tensor:
    return grad if scale is None else grad * reference._per_channel(scale, grad).to(grad.dtype)


@_differentiable
class _Mix(torch.autograd.Function):
    operator = mix_op

    @staticmethod
    def forward(ctx, x, partner, lam, rows, scale, shift, dtype, memory_format):
        ctx.save_for_backward(x, partner, lam, rows, scale)
        return _below_autograd(mix_op, (x, partner, lam, rows, scale, shift, dtype, memory_format))

    @staticmethod
    def backward(ctx, grad):
        x, partner, lam, rows, scale = ctx.saved_tensors
        grad = _per_channel(grad, scale)
        count = grad.shape[0]
        sequence = torch.arange(count, device=x.device)
        own = sequence if rows is None else rows
        other = reference._partner_of(x, partner, own)
        dx = dlam = None
        if ctx.needs_input_grad[0]:
            weight = lam.expand(count)
            order, offsets = _transpose(torch.cat([own, other]), x.shape[0])
            weight = torch.cat([weight, 1 - weight])[order]
            dx = gather_sum_op(grad, sequence.repeat(2)[order], weight, offsets).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grad = grad.to(x.dtype)
            dlam = row_dot_op(grad, x, sequence, own) - row_dot_op(grad, x, sequence, other)
            dlam = dlam if lam.dim() else dlam.sum()
        return dx, None, dlam, None, None, None, None, None


# gather_sum and row_dot: what gradients of mixing are made of, and mixing of more than two samples --------------------

gather_sum_op = _define(
    "gather_sum(Tensor src, Tensor index, Tensor weight, Tensor offsets) -> Tensor",
    lambda src, index, weight, offsets: src.new_empty((offsets.shape[0] - 1, *src.shape[1:])),
)
row_dot_op = _define(
    "row_dot(Tensor a, Tensor b, Tensor a_index, Tensor b_index) -> Tensor",
    lambda a, b, a_index, b_index: a.new_empty(a_index.shape, dtype=reference.accumulate_dtype(a.dtype)),
)


@_differentiable
class _GatherSum(torch.autograd.Function):
    operator = gather_sum_op

    @staticmethod
    def forward(ctx, src, index, weight, offsets):
        ctx.save_for_backward(src, index, weight, offsets)
        return _below_autograd(gather_sum_op, (src, index, weight, offsets))

    @staticmethod
    def backward(ctx, grad):
        src, index, weight, offsets = ctx.saved_tensors
        sequence = torch.arange(index.shape[0], device=index.device)
        segment = torch.searchsorted(offsets, sequence, right=True) - 1
        dsrc = dweight = None
        if ctx.needs_input_grad[0]:
            order, transposed = _transpose(index, src.shape[0])
            dsrc = gather_sum_op(grad, segment[order], weight[order], transposed)
        if ctx.needs_input_grad[2]:
            dweight = row_dot_op(grad, src, segment, index)
        return dsrc, None, dweight, None


@_differentiable
class _RowDot(torch.autograd.Function):
    operator = row_dot_op

    @staticmethod
    def forward(ctx, a, b, a_index, b_index):
        ctx.save_for_backward(a, b, a_index, b_index)
        return _below_autograd(row_dot_op, (a, b, a_index, b_index))

    @staticmethod
    def backward(ctx, grad):
        a, b, a_index, b_index = ctx.saved_tensors
        gradients = []
        for needed, rows, own, other, other_index in (
            (ctx.needs_input_grad[0], a.shape[0], a_index, b, b_index),
            (ctx.needs_input_grad[1], b.shape[0], b_index, a, a_index),
        ):
            if needed:
                order, offsets = _transpose(own, rows)
                gradients.append(gather_sum_op(other, other_index[order], grad[order], offsets))
            else:
                gradients.append(None)
        return *gradients, None, None


# ce_entropy -------------------------------------------------------------------------------------------------------


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
ce_entropy_op = _define(f"ce_entropy(Tensor logits, {_TARGET_SCHEMA}) -> (Tensor, Tensor, Tensor)", _ce_entropy_fake)
ce_entropy_backward_op = _define(
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
    targets and in λ; for the backward two floats a row are kept beside the arguments.

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
    outputs = _call(ce_entropy_op, rows, *parts, class_weight, smoothing, ignore_index, False)
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
    ce, entropy, _ = _call(ce_entropy_op, rows, *parts, None, 0.0, reference.IGNORE_INDEX, True)
    return BCEEntropy(ce.view(logits.shape[:-1]), entropy.view(logits.shape[:-1]))


def as_multilabel(target: Target) -> Target:
    if target.target.dim() != 2:
        raise TypeError("target must be floating point (..., C) for a sigmoid model, got class indices")
    return target


@_differentiable
class _CEEntropy(torch.autograd.Function):
    operator = ce_entropy_op

    @staticmethod
    def forward(ctx, logits, target, partner, lam, class_weight, *options):
        ce, entropy, lse = _below_autograd(ce_entropy_op, (logits, target, partner, lam, class_weight, *options))
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
            dlogits = ce_entropy_backward_op(*gradients, logits, entropy, lse, *target, *ctx.options)
        if grad_ce is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[3]):
            # ∂CE/∂y_k = lse - z_k, and -z_k for sigmoid models.
            z, (smoothing, ignore_index, sigmoid) = logits.to(lse.dtype), ctx.options
            dy = grad_ce.unsqueeze(1) * (-z if sigmoid else lse.unsqueeze(1) - z)
            dtarget, dlam = double_backward.target_gradients(dy, *target, smoothing, ignore_index)
        return dlogits, dtarget, None, dlam, None, None, None, None


@_differentiable
class _CEEntropyBackward(torch.autograd.Function):
    operator = ce_entropy_backward_op

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:10])
        ctx.options = args[10:]
        return _below_autograd(ce_entropy_backward_op, args)

    @staticmethod
    def backward(ctx, v):
        return *double_backward.ce_entropy_double_backward(v, *ctx.saved_tensors, *ctx.options), None, None, None


# mixupe_loss ------------------------------------------------------------------------------------------------------


def _mixupe_loss_fake(logits, *args, **kwargs):
    compute = reference.accumulate_dtype(logits.dtype)
    return tuple(logits.new_empty(size, dtype=compute) for size in ((), (5,), *[logits.shape[:1]] * 3))


mixupe_loss_op = _define(
    "mixupe_loss(Tensor logits, Tensor target, Tensor? partner, Tensor? lam, Tensor eta, Tensor reg_weight, "
    "int num_mixed, int num_reg, int penalty=0, float threshold=1.0, bool rescale=True, float label_smoothing=0.0, "
    "bool sigmoid=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mixupe_loss_fake,
)
_LOSS_BACKWARD_SCHEMA = (
    "Tensor grad, Tensor logits, Tensor target, Tensor? partner, Tensor? lam, Tensor eta, Tensor reg_weight, "
    "Tensor parts, Tensor ce, Tensor entropy, Tensor lse, int num_mixed, int num_reg, int penalty=0, "
    "float threshold=1.0, float label_smoothing=0.0, bool sigmoid=False"
)
mixupe_loss_backward_op = _define(
    f"mixupe_loss_backward({_LOSS_BACKWARD_SCHEMA}) -> Tensor",
    lambda grad, logits, *args, **kwargs: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
mixupe_loss_backward_out_op = _define(
    f"mixupe_loss_backward_out({_LOSS_BACKWARD_SCHEMA}, *, Tensor(a!) out) -> ()", lambda *args, **kwargs: None
)


@_differentiable
class _MixupELoss(torch.autograd.Function):
    operator = mixupe_loss_op

    @staticmethod
    def forward(ctx, *args):
        outputs = _below_autograd(mixupe_loss_op, args)
        ctx.save_for_backward(*args[:6], *outputs[1:])
        num_mixed, num_reg, penalty, threshold, _, *rest = args[6:]
        ctx.options = (num_mixed, num_reg, penalty, threshold, *rest)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        if any(ctx.needs_input_grad[1:]):
            raise RuntimeError("mixupe::mixupe_loss is differentiable in the logits only; use mk.mixupe_loss")
        dlogits = None
        if grad is not None:
            dlogits = mixupe_loss_backward_op(grad, *ctx.saved_tensors, *ctx.options)
        return dlogits, *[None] * 12


@_differentiable
class _MixupELossBackward(torch.autograd.Function):
    operator = mixupe_loss_backward_op

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:11])
        ctx.options = args[11:]
        return _below_autograd(mixupe_loss_backward_op, args)

    @staticmethod
    def backward(ctx, v):
        return *double_backward.mixupe_loss_double_backward(v, *ctx.saved_tensors, *ctx.options), *[None] * 15


def operators() -> dict[str, list[str]]:
    """The name of each operator with the names of its reference's parameters: what a backend has to provide."""
    names = [name for name in vars(torch.ops.mixupe) if callable(getattr(reference, name, None))]
    return {name: list(inspect.signature(getattr(reference, name)).parameters) for name in names}
