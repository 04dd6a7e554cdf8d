"""Training-mode batch norm of two kinds of rows over the rows of several ranks: each kind by the statistics of all of its rows."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..conventions import accumulate_dtype
from .normalising import NormLayer, kinds
from .ranks import all_gather, once
from .reference import per_channel


def _over(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _statistics(x: Tensor, num_mixed: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, number of values) of each kind, (2, C), (2, C) and (2, 1), over all ranks, by one all-gather."""
    compute, channels = accumulate_dtype(x.dtype), x.shape[1]
    mine = torch.zeros(2, 2 * channels + 1, dtype=compute, device=x.device)
    for kind, rows in enumerate(kinds(num_mixed)):
        part = x[rows].to(compute)
        values = part.shape[0] * part.shape[2:].numel()
        if values:
            mine[kind, :channels], mine[kind, channels:-1] = reversed(torch.var_mean(part, _over(part), correction=0))
            mine[kind, -1].fill_(values)
    found = all_gather(mine, group)
    means, variances, counts = found.split([channels, channels, 1], 2)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total


class _OverRanks(torch.autograd.Function):
    """(out, mean, variance, number of values). One collective in the forward and one in the backward, as SyncBatchNorm has."""

    @staticmethod
    def forward(ctx, x, weight, bias, num_mixed, eps, group):
        mean, variance, total = _statistics(x, num_mixed, group)
        inverse, out = (variance + eps).rsqrt(), torch.empty_like(x)
        for kind, rows in enumerate(kinds(num_mixed)):
            value = (x[rows].to(mean.dtype) - per_channel(mean[kind], x)) * per_channel(inverse[kind], x)
            if weight is not None:
                value = value * per_channel(weight.to(mean.dtype), x)
            out[rows] = value if bias is None else value + per_channel(bias.to(mean.dtype), x)
        ctx.save_for_backward(x, weight, bias, mean, inverse, total)
        ctx.num_mixed, ctx.group = num_mixed, group
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    def backward(ctx, grad, *_):
        with torch.no_grad():
            found = _OverRanks._gradients(ctx, grad)
        return *once(found, (grad, *ctx.saved_tensors[:3])), *[None] * 3

    @staticmethod
    def _gradients(ctx, grad):
        x, weight, bias, mean, inverse, total = ctx.saved_tensors
        parts, compute = kinds(ctx.num_mixed), mean.dtype
        sums = torch.zeros(2, 2, x.shape[1], dtype=compute, device=x.device)
        for kind, rows in enumerate(parts):
            g, centred = grad[rows].to(compute), x[rows].to(compute) - per_channel(mean[kind], x)
            sums[kind, 0] = g.sum(_over(x))
            sums[kind, 1] = (g * centred).sum(_over(x)) * inverse[kind]
        # A layer's own gradients are those of its rank's rows: DistributedDataParallel takes their mean.
        d_bias, d_weight = sums.sum(0).unbind()
        dist.all_reduce(sums, group=ctx.group)
        sums /= total.clamp(min=1).unsqueeze(1)
        d_x = torch.empty_like(x)
        for kind, rows in enumerate(parts):
            scale = inverse[kind] if weight is None else inverse[kind] * weight.to(compute)
            normal = (x[rows].to(compute) - per_channel(mean[kind], x)) * per_channel(inverse[kind], x)
            less = per_channel(sums[kind, 0], x) + normal * per_channel(sums[kind, 1], x)
            d_x[rows] = (grad[rows].to(compute) - less) * per_channel(scale, x)
        return (
            d_x,
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
        )


def batch_norm_over_ranks(x: Tensor, num_mixed: int, layer: NormLayer, group: Any) -> Tensor:
    """``batch_norm_apart`` over the rows of all ranks of ``group``, each of which has any number of each kind.

    The running statistics follow the clean rows, or the mixed ones where no rank has a clean row.
    """
    out, mean, variance, total = _OverRanks.apply(x, layer.weight, layer.bias, num_mixed, layer.eps, group)
    if layer.running_mean is not None and layer.running_var is not None:
        followed = (total[1] > 0).long()
        mean, variance, values = (value.index_select(0, followed).squeeze(0) for value in (mean, variance, total))
        unbiased = variance * (values / (values - 1).clamp(min=1))
        layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
        layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), layer.momentum)
    return out
