"""The first-order term of mixup without approximation (MixupE, Zou et al., UAI 2023, eq. 4), by one forward-mode JVP."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .. import checks


class _DifferentiableBatchNorm(TorchFunctionMode):
    """Batch norm by its formula. The derivative of the built-in one's forward-mode formula takes the batch's statistics for
    constants (torch 2.13), so gradients through a JVP would silently be wrong in train mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = [0, *range(2, x.dim())]
    per_channel = [1, -1, *[1] * (x.dim() - 2)]
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    if running_mean is not None:
        count = x.numel() // x.shape[1]
        unbiased = variance * (count / max(count - 1, 1))
        for running, now in ((running_mean, mean), (running_var, unbiased)):
            now = forward_ad.unpack_dual(now).primal.detach()
            # .data, as the built-in kernel does it: an earlier forward pass saved the buffers, though it needs them not.
            running.data.mul_(1 - momentum).add_(now.flatten().to(running.dtype), alpha=momentum)
    out = (x - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        out = out * weight.view(per_channel)
    return out if bias is None else out + bias.view(per_channel)


def exact_q(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, x_mean: Tensor, *, detach_residual: bool = False
) -> Tensor:
    r"""q(x) = (p - y)ᵀ J_f(x) (E[x'] - x) of each row (MixupE, eq. 4, "accurate").

    ``q_hat`` approximates it from the logits alone; this costs about two more forward passes. Pass the result to
    :class:`MixupELoss` as ``q``. With ``penalty="threshold"`` and ``detach_residual=True`` that is version 1 of the authors'
    public code, with ``penalty="abs"`` version 2.

    Args:
        model: f, from (B, ...) to logits (B, C). Every operation in it needs a forward-mode formula.
        x: (B, ...) clean inputs, floating point.
        labels: (B,) int64 classes or (B, C) soft labels.
        x_mean: E[x'], the mean of the training inputs, of shape ``x.shape[1:]`` or one that broadcasts to it: see
            :func:`input_mean`.
        detach_residual: treat p - y as a constant.

    Returns:
        (B,) of the logits' dtype, differentiable in the model's parameters.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.

    A layer that couples the rows of a batch, as BatchNorm in train mode does, is differentiated as the function of the
    whole batch that it is: each row's q then also carries what moving the *other* rows towards the mean does to it.
    Summed over the batch that equals the double-backward formulation exactly; row by row the two differ. In eval mode, or
    with layers that treat rows separately, they are the same.
    """
    checks.tensor("x", x)
    checks.dtype("x", x, checks.LOGITS_DTYPES)
    checks.tensor("x_mean", x_mean)
    checks.same_device("x_mean", x_mean, "x", x)
    try:
        direction = x_mean.to(x.dtype).expand_as(x) - x
    except RuntimeError:
        raise ValueError(f"x_mean must broadcast to {tuple(x.shape[1:])}, got {tuple(x_mean.shape)}") from None
    # Not torch.func.jvp: it refuses the running statistics that BatchNorm updates in place.
    with _DifferentiableBatchNorm(), forward_ad.dual_level():
        logits, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
        if tangent is None:
            raise ValueError("model must depend on its input through operations that have a forward-mode derivative")
    checks.tensor("labels", labels)
    checks.same_device("labels", labels, "x", x)
    p = logits.softmax(1)
    if labels.is_floating_point():
        checks.shape("labels", labels, logits.shape)
        y = labels.to(p.dtype)
    else:
        checks.dtype("labels", labels, (torch.int64,))
        checks.shape("labels", labels, logits.shape[:1])
        y = F.one_hot(labels, logits.shape[1]).to(p.dtype)
    residual = p - y
    return ((residual.detach() if detach_residual else residual) * tangent).sum(1)


def input_mean(loader: Iterable, *, progress: bool = True) -> Tensor:
    """E[x'], the mean of all inputs of a data loader, for :func:`exact_q`.

    Args:
        loader: yields tensors (B, ...), or tuples and lists whose first entry is one.
        progress: show a progress bar, if the ``rich`` package is installed.

    Returns:
        The mean over the samples, of shape (...), float32, on the batches' device; summed in float64.

    Raises:
        TypeError: if the loader yields something else.
        ValueError: if it yields no sample.
    """
    batches = loader
    if progress:
        try:
            from rich.progress import track
        except ImportError:
            pass
        else:
            batches = track(loader, description="mean of the inputs", transient=True)
    total, count = None, 0
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        checks.tensor("each batch of loader", x)
        part = x.sum(0, dtype=torch.float64)
        total = part if total is None else total + part
        count += x.shape[0]
    if not count:
        raise ValueError("loader must yield at least one sample, got none")
    return (total / count).float()
