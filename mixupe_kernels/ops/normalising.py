"""Training-mode batch norm of two kinds of rows, each by its own statistics. Definition, fake, operator, backward, function."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..conventions import accumulate_dtype, row_format
from .arguments import check_tensor
from .registration import define, is_transformed, without_gradient

Three = tuple[Tensor, Tensor, Tensor]


def _check(x: Tensor, num_mixed: int) -> None:
    checks.dtype("x", x, checks.LOGITS_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, C, ...), got {tuple(x.shape)}")
    if not 0 < num_mixed < x.shape[0]:
        raise ValueError(f"num_mixed must be in [1, {x.shape[0] - 1}], got {num_mixed}")
    if x.numel() == 0:
        raise ValueError(f"x must have at least one value, got shape {tuple(x.shape)}")


def kinds(num_mixed: int) -> tuple[slice, slice]:
    """The mixed rows, and the clean ones after them."""
    return slice(num_mixed), slice(num_mixed, None)


def _writes_parts(x: Tensor) -> bool:
    """Whether native_batch_norm writes into a part of a tensor: it does not for strided x (torch 2.13)."""
    return x.device.type in ("cpu", "cuda") and (x.is_contiguous() or x.is_contiguous(memory_format=row_format(x)))


def _statistics(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=accumulate_dtype(x.dtype))


def normalise_apart(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_mixed: int,
    momentum: float,
    eps: float,
    *,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> Three:
    """(out, mean, 1/std) of x (N, C, ...): rows of each kind less their mean, by their std; statistics (2, C), mixed rows' first.

    The running statistics follow the clean rows, x[num_mixed:]. PyTorch's kernels do it by parts, without a copy.
    """
    _check(x, num_mixed)
    compute, channels = accumulate_dtype(x.dtype), x.shape[1:2]
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in named.items():
        check_tensor(name, value, compute, channels, x, "x")
    mixed, clean = (x[rows] for rows in kinds(num_mixed))
    of_mixed = (weight, bias, None, None, True, 0.0, eps)
    of_clean = (weight, bias, running_mean, running_var, True, momentum, eps)
    if not _writes_parts(x):
        results = torch.native_batch_norm(mixed, *of_mixed), torch.native_batch_norm(clean, *of_clean)
        outs, means, inverses = zip(*results, strict=True)
        return torch.cat(outs), torch.stack(means), torch.stack(inverses)
    out, mean, inverse = torch.empty_like(x), _statistics(x, 2, *channels), _statistics(x, 2, *channels)
    torch.native_batch_norm(mixed, *of_mixed, out=(out[:num_mixed], mean[0], inverse[0]))
    torch.native_batch_norm(clean, *of_clean, out=(out[num_mixed:], mean[1], inverse[1]))
    return out, mean, inverse


def normalise_apart_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, num_mixed: int
) -> Three:
    """The gradients of x, weight and bias: those of the two kinds' weights are added. Differentiable."""
    _check(x, num_mixed)
    compute, channels = accumulate_dtype(x.dtype), x.shape[1:2]
    check_tensor("grad", grad, x.dtype, x.shape, x, "x")
    check_tensor("weight", weight, compute, channels, x, "x")
    for name, value in (("mean", mean), ("inverse_std", inverse_std)):
        check_tensor(name, value, compute, (2, *channels), x, "x")
    found = []
    for kind, rows in enumerate(kinds(num_mixed)):
        saved = None, None, mean[kind], inverse_std[kind]
        given = True, 0.0, (True, True, True)  # ε is in 1/std already
        found.append(torch.ops.aten.native_batch_norm_backward(grad[rows], x[rows], weight, *saved, *given))
    of_x, of_weight, of_bias = zip(*found, strict=True)
    return torch.cat(of_x), sum(of_weight).to(compute), sum(of_bias).to(compute)


normalise_apart_op = without_gradient(
    define(
        normalise_apart,
        lambda x, *_, **written: (torch.empty_like(x), _statistics(x, 2, x.shape[1]), _statistics(x, 2, x.shape[1])),
    )
)
normalise_apart_backward_op = without_gradient(
    define(
        normalise_apart_backward,
        lambda grad, x, *_: (torch.empty_like(x), _statistics(x, x.shape[1]), _statistics(x, x.shape[1])),
    )
)


class NormLayer(NamedTuple):
    """What a BatchNorm layer has for a batch in training. ``momentum`` weighs the batch's part of the running statistics."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float

    def normalise(self, x: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)

    def without_following(self) -> "NormLayer":
        """The same with running statistics that nobody reads: a layer without a weight computes in their precision."""
        mean, var = (None if value is None else torch.zeros_like(value) for value in self[2:4])
        return self._replace(running_mean=mean, running_var=var, momentum=0.0)


class _NormaliseApart(torch.autograd.Function):
    """Without a ``setup_context``, for which ``apply`` takes 100 µs a call."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, num_mixed):
        written = {"running_mean": running_mean, "running_var": running_var}
        out, mean, inverse = normalise_apart_op(x, weight, bias, num_mixed, momentum, eps, **written)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.num_mixed = num_mixed
        return out

    @staticmethod
    def backward(ctx, grad):
        # A second derivative is PyTorch's own, of its own kernels.
        backward = normalise_apart_backward if torch.is_grad_enabled() else normalise_apart_backward_op
        x, weight, mean, inverse = ctx.saved_tensors
        found = backward(grad, x, weight, mean, inverse, ctx.num_mixed)
        needed = zip(found, ctx.needs_input_grad, strict=False)
        return *(gradient if need else None for gradient, need in needed), *[None] * 5


def batch_norm_apart(x: Tensor, num_mixed: int, layer: NormLayer) -> Tensor:
    """``F.batch_norm`` in training, of x[:num_mixed] and of x[num_mixed:]; the running statistics follow the latter.

    The plain form is two calls and their concatenation: a compiled graph fuses them, forward mode and torch.func transform
    them, and PyTorch knows layers of half precision. Elsewhere the concatenation would be a pass over the activations.
    """
    accurate = (x if layer.weight is None else layer.weight).dtype is accumulate_dtype(x.dtype)
    if torch.compiler.is_compiling() or is_transformed(x) or not accurate or x.numel() == 0:
        mixed, clean = (x[rows] for rows in kinds(num_mixed))
        return torch.cat([layer.without_following().normalise(mixed), layer.normalise(clean)])
    return _NormaliseApart.apply(x, *layer, num_mixed)
