"""Classifier and loss as one, where other ranks have rows or classes, too."""

import operator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import debug, ops
from ..conventions import accumulate_dtype
from ..ops import LossArguments, RowOptions, RowOutputs, RowTarget
from ..ops.ranks import ClassShard, OfClasses, Ranks, merged, once
from ..target import Parsed, is_composed, renamed
from .composed import composed_loss, loss_of_outputs
from .ranks import Over, StepRows, is_dtensor, localized


def localized_linear(hidden: Any, weight: Tensor, bias: Any, target: Any, over: Over) -> tuple:
    """(hidden, weight, bias, target, ranks) of this rank: DTensors unwrapped, a ``hidden`` that every rank has, a divided weight."""
    weight, target, shard = localized(weight, target, over.class_shards, -1, "weight", 0)
    if is_dtensor(hidden) and not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(f"hidden must be on every rank (Replicate), got {hidden.placements}")
    hidden, bias = (v.to_local(grad_placements=v.placements) if is_dtensor(v) else v for v in (hidden, bias))
    return hidden, weight, bias, target, over.with_shard(shard, hidden)


def _statistics(logits: Tensor, target: RowTarget, options: RowOptions, shard: ClassShard | None) -> OfClasses:
    if shard is not None:
        return shard.statistics(logits, target, options)
    outputs = ops.ce_entropy(logits, target, options)
    return OfClasses(*outputs, torch.zeros_like(outputs.lse))


class _Statistics(torch.autograd.Function):
    """CE, H, lse and Σy of each row from its own classes, whose logits are made ``chunk_rows`` rows at a time, twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, options, dtype, chunk_rows, shard):
        ctx.save_for_backward(hidden, weight, bias, *target)
        ctx.options, ctx.dtype, ctx.chunk_rows, ctx.shard = options, dtype, chunk_rows, shard
        found = [hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(dtype)) for _ in OfClasses._fields]
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(hidden, chunk_rows):
                logits = F.linear(hidden[chunk].to(dtype), weight, bias)
                rows = _statistics(logits, target.map(operator.itemgetter(chunk)), options, shard)
                for whole, part in zip(found, rows, strict=True):
                    whole[chunk] = part
        ctx.mark_non_differentiable(found[3])
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads):
        with torch.no_grad():
            found = _Statistics._gradients(ctx, *grads)
        return *once(found, (*grads, *ctx.saved_tensors[:3])), *[None] * 5

    @staticmethod
    def _gradients(ctx, *grads):
        hidden, weight, bias, labels, partner_labels, lam = ctx.saved_tensors
        target, dtype = RowTarget(labels, partner_labels, lam), ctx.dtype
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = accumulate_dtype(dtype)  # sums over chunks are float32 (float64), whatever the logits are
        d_hidden = hidden.new_empty(hidden.shape, dtype=wide)
        d_weight = torch.zeros_like(weight, dtype=wide)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for chunk in _chunks(hidden, ctx.chunk_rows):
            inputs = hidden[chunk].to(dtype)
            with torch.enable_grad():
                logits = F.linear(inputs, matrix, offset).detach().requires_grad_()
                rows = _statistics(logits, target.map(operator.itemgetter(chunk)), ctx.options, ctx.shard)
            (dz,) = torch.autograd.grad(rows[:3], logits, [grad[chunk] for grad in grads[:3]])
            d_hidden[chunk] = dz @ matrix
            d_weight += dz.t() @ inputs
            if d_bias is not None:
                d_bias += dz.sum(0, dtype=wide)
        if ctx.shard is not None:  # each rank has the share of its own classes
            dist.all_reduce(d_hidden, group=ctx.shard.group)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias


def _chunks(hidden: Tensor, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, len(hidden))) for begin in range(0, len(hidden), size)]


def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | tuple,
    parsed: Parsed,
    arguments: LossArguments,
    dtype: torch.dtype,
    chunk_rows: int,
    ranks: Ranks,
) -> Tensor:
    """``linear_mixupe_loss`` of checked arguments. Rows are few numbers each once their logits are gone: the rest is composed."""
    if isinstance(ranks.merge, StepRows):
        arguments = ranks.merge.share_of(arguments)
    target_of_rows, options = parsed.target, arguments.of_rows()
    try:
        if debug.ON:
            debug.ran("linear loss", "over ranks")
        if is_composed(target_of_rows) and ranks.shard is None:
            return composed_loss(F.linear(hidden, weight, bias), target_of_rows, arguments, ranks=ranks)[0]
        arguments.check(parsed.rows)
        (RowTarget(target_of_rows.labels) if target_of_rows.is_dense() else target_of_rows).check(parsed.rows)
        found = _Statistics.apply(hidden, weight, bias, target_of_rows, options, dtype, chunk_rows, ranks.shard)
        outputs = RowOutputs(*found[:3])
        if ranks.shard is not None:
            outputs, target_of_rows = merged(OfClasses(*found), target_of_rows, options.sigmoid, ranks.shard)
            arguments = arguments._replace(label_smoothing=0.0)
        return loss_of_outputs(outputs, outputs, target_of_rows, arguments, merge=ranks.merge)[0]
    except (RuntimeError, TypeError, ValueError) as error:
        raise renamed(error, target) from None
