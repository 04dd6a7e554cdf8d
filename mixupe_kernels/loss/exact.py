"""The first-order term of mixup without approximation (MixupE, Zou et al., UAI 2023, eq. 4), by one forward-mode JVP."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import checks
from ..conventions import IGNORE_INDEX, accumulate_dtype, check_range, wide_dtype

# What PyTorch's forward-mode formulas do to a gradient through the tangent (torch 2.13, every operator compared with finite
# differences): some take a statistic or a factor that the operator saved for a constant, and give a wrong gradient; some
# have no derivative; some write in place to what the gradient needs, unless a dispatch mode is active. Layers of torch.nn
# of the first two kinds are written out here by their formulas, the last is cured by the mode, and all else is refused.


def _standardize(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) over ``dims``, and the mean and variance, in the dtype that statistics have."""
    x = x.to(accumulate_dtype(x.dtype))
    centred = x - (mean := x.mean(dims, keepdim=True))
    variance = centred.square().mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + eps), mean, variance


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], dtype: torch.dtype) -> Tensor:
    x = x if weight is None else x * weight.view(shape)
    return (x if bias is None else x + bias.view(shape)).to(dtype)


def _move(running: Tensor | None, now: Tensor, momentum: float) -> None:
    if running is not None:
        # .data, as the built-in kernel does it: an earlier forward pass saved the buffers, though it needs them not.
        now = forward_ad.unpack_dual(now).primal.detach().to(running.dtype)
        running.data.mul_(1 - momentum).add_(now, alpha=momentum)


def _channel_norm(x, running_mean, running_var, weight, bias, momentum, eps, dims: list[int]) -> Tensor:
    """Batch norm where ``dims`` hold the batch, instance norm where they do not."""
    count = math.prod(x.shape[dim] for dim in dims)
    if count == 1:
        raise ValueError(f"model must normalise over more than 1 value per channel in training, got {tuple(x.shape)}")
    out, mean, variance = _standardize(x, dims, eps)
    channels = x.shape[1]
    _move(running_mean, mean.reshape(-1, channels).mean(0), momentum)
    _move(running_var, variance.reshape(-1, channels).mean(0) * (count / max(count - 1, 1)), momentum)
    return _affine(out, weight, bias, [1, -1, *[1] * (x.dim() - 2)], x.dtype)


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _channel_norm(x, running_mean, running_var, weight, bias, momentum, eps, [0, *range(2, x.dim())])


def _instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _channel_norm(x, running_mean, running_var, weight, bias, momentum, eps, [*range(2, x.dim())])


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    out, _, _ = _standardize(x, [*range(-len(normalized_shape), 0)], eps)
    return _affine(out, weight, bias, list(normalized_shape), x.dtype)


def _rms_norm(x, normalized_shape, weight=None, eps=None):
    wide = x.to(accumulate_dtype(x.dtype))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    square = wide.square().mean([*range(-len(normalized_shape), 0)], keepdim=True)
    return _affine(wide * torch.rsqrt(square + eps), weight, None, list(normalized_shape), x.dtype)


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    out, _, _ = _standardize(x.reshape(x.shape[0], num_groups, -1), [2], eps)
    return _affine(out.view(x.shape), weight, bias, [1, -1, *[1] * (x.dim() - 2)], x.dtype)


def _glu(x, dim=-1):
    own, gate = x.chunk(2, dim)
    return own * gate.sigmoid()


def _hardsigmoid(x, inplace=False):
    return F.relu6(x + 3) / 6


_FORMULAS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.glu: _glu,
    F.hardsigmoid: _hardsigmoid,
}

# Operators whose tangent has a wrong gradient, and batch norm's, which has one in training only.
_WRONG = {
    "native_layer_norm",
    "_fused_rms_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_with_update",
    "linalg_cholesky_ex",
    "cholesky_inverse",
    "cholesky_solve",
    "_linalg_det",
    "_linalg_slogdet",
    "_linalg_eigh",
    "_linalg_solve_ex",
    "linalg_householder_product",
}
_WRONG_IN_TRAINING = {"native_batch_norm", "_native_batch_norm_legit"}


class _Formulas(TorchFunctionMode):
    """Layers by their formulas."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _FORMULAS.get(func, func)(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Note the first operator whose tangent has a wrong gradient, however the model came to call it."""

    wrong: Any = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _WRONG or (name in _WRONG_IN_TRAINING and any(value is True for value in args)):
            self.wrong = self.wrong or func
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        if self.wrong is not None:  # not raised within the model, as TorchScript would drop the words
            raise NotImplementedError(
                f"model must not call {self.wrong} where a gradient is wanted: through PyTorch's forward-mode derivative of "
                "it, the gradient would be wrong. Layers of torch.nn may be used, and torch.no_grad()"
            )


def _check_labels(labels: Tensor, x: Tensor) -> None:
    checks.tensor("labels", labels)
    checks.same_device("labels", labels, "x", x)
    if labels.is_floating_point():
        if labels.dim() != 2 or labels.shape[0] != x.shape[0]:
            raise ValueError(f"labels must have shape ({x.shape[0]}, C), got {tuple(labels.shape)}")
    else:
        checks.dtype("labels", labels, (torch.int64,))
        checks.shape("labels", labels, x.shape[:1])


def _along_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Σ_k y_k · values_k of each row."""
    if labels.is_floating_point():
        return (labels.to(values.dtype) * values).sum(1)
    return values.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)


def exact_q(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, x_mean: Tensor, *, detach_residual: bool = False
) -> Tensor:
    r"""q(x) = (p - y)ᵀ J_f(x) (E[x'] - x) of each row (MixupE, eq. 4, "accurate").

    ``q_hat`` approximates it from the logits alone; this costs about two more forward passes. Pass the result to
    :class:`MixupELoss` as ``q``. Of the authors' public code, version 2 is ``penalty="abs"`` with ``detach_residual=True``,
    as long as layers treat rows separately: with BatchNorm in train mode the two are not the same, row by row or in their
    mean of absolute values (see below). Version 1 adds η·w·mean(q·[q < t]), which is
    ``penalty=lambda q: q * (q < t)`` with ``detach_residual=True``. ``penalty="threshold"`` subtracts that term, as their
    version 3 does with q̂.

    Args:
        model: f, from (B, ...) to logits (B, C). Every operation in it needs a forward-mode formula. Where gradients
            through that formula would be wrong, layers of torch.nn are computed by their definitions, and all other
            operations (``torch.linalg.det`` or ``solve``; norms in TorchScript) are refused.
        x: (B, ...) clean inputs, floating point.
        labels: (B,) int64 classes or (B, C) soft labels. q is 0 where a class is -100.
        x_mean: E[x'], the mean of the training inputs, of shape ``x.shape[1:]`` or one that broadcasts to it: see
            :func:`input_mean`.
        detach_residual: treat p - y as a constant.

    Returns:
        (B,) of the logits' dtype, differentiable in the model's parameters.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        NotImplementedError: for a model with an operation that has no forward-mode derivative, or one whose gradient would
            be wrong.

    A layer that couples the rows of a batch, as BatchNorm in train mode does, is differentiated as the function of the
    whole batch that it is: each row's q then also carries what moving the *other* rows towards the mean does to it.
    Summed over the batch that equals the double-backward formulation exactly; row by row the two differ. In eval mode, or
    with layers that treat rows separately, they are the same.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    checks.boolean("detach_residual", detach_residual)
    checks.tensor("x", x)
    checks.dtype("x", x, checks.LOGITS_DTYPES)
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    _check_labels(labels, x)
    checks.tensor("x_mean", x_mean)
    checks.same_device("x_mean", x_mean, "x", x)
    if x_mean.is_complex():
        raise TypeError(f"x_mean must be real, got {x_mean.dtype}")
    try:
        direction = x_mean.to(x.dtype).expand_as(x) - x
    except RuntimeError:
        raise ValueError(f"x_mean must broadcast to {tuple(x.shape[1:])}, got {tuple(x_mean.shape)}") from None
    watch = _Watch()
    # Not torch.func.jvp: it refuses the running statistics that BatchNorm updates in place. Of attention's kernels only the
    # plain one has a forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), _Formulas(), forward_ad.dual_level(), watch:
        output = checks.tensor("the output of model", model(forward_ad.make_dual(x, direction)))
        if torch.is_grad_enabled():
            watch.check()
        logits, tangent = forward_ad.unpack_dual(output)
        if tangent is None:
            raise ValueError("model must depend on its input through operations that have a forward-mode derivative")
        if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
            raise ValueError(f"the output of model must have shape ({x.shape[0]}, C), got {tuple(logits.shape)}")
        kept = None
        if labels.is_floating_point():
            checks.shape("labels", labels, logits.shape)
        else:
            kept = labels != IGNORE_INDEX
            classes = logits.shape[1]
            check_range("labels", labels.where(kept, 0), 0, classes - 1, f"a class in [0, {classes - 1}]")
        p = logits.softmax(1)
        p = p.detach() if detach_residual else p
        q = (p * tangent).sum(1) - _along_labels(tangent, labels)
    return q if kept is None else q.where(kept, 0)


def input_mean(loader: Iterable, *, progress: bool = True) -> Tensor:
    """E[x'], the mean of all inputs of a data loader, for :func:`exact_q`.

    Args:
        loader: yields tensors (B, ...), or tuples and lists whose first entry is one.
        progress: show a progress bar, if the ``rich`` package is installed.

    Returns:
        The mean over the samples, of shape (...), float32, on the batches' device; summed in float64 where the device has it.

    Raises:
        TypeError: if the loader cannot be iterated over or yields something else.
        ValueError: if it yields no sample, or samples of several shapes.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be iterable, got {type(loader).__name__}")
    batches = loader
    if checks.boolean("progress", progress):
        try:
            from rich.progress import track
        except ImportError:
            pass
        else:
            batches = track(loader, description="mean of the inputs", transient=True)
    total: Tensor | None = None
    count = 0
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        checks.tensor("each batch of loader", x)
        if x.dim() == 0 or x.is_complex() or (total is not None and x.shape[1:] != total.shape):
            expected = "(B, ...)" if total is None else f"(B, *{tuple(total.shape)})"
            raise ValueError(
                f"each batch of loader must be real, of shape {expected}, got {x.dtype} of {tuple(x.shape)}"
            )
        part = x.sum(0, dtype=wide_dtype(x.device))
        total = part if total is None else total + part
        count += x.shape[0]
    if total is None or not count:
        raise ValueError("loader must yield at least one sample, got none")
    return (total / count).float()
