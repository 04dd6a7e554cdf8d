"""Classifier and loss as one: for large C the (N, C) logits never exist at once."""

import contextlib
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, debug, ops
from ..conventions import PENALTIES, accumulate_dtype
from ..ops import LossArguments, LossStats, Parts, RowOutputs, RowTarget, reference
from ..target import as_scalar, check_multilabel, is_composed, parse, renamed
from . import linear_ranks
from .composed import composed_loss
from .options import Options
from .ranks import ClassShards, Over, StepRows, is_dtensor

# Logits of one chunk by default: 2^24 elements are 64 MiB of float32, large enough for the matrix product to run at full
# speed, small beside any model.
_CHUNK_ELEMENTS = 2**24


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _chunks(rows: int, size: int) -> list[slice]:
    """At least one: no rows have a loss, too."""
    return [slice(begin, min(begin + size, rows)) for begin in range(0, max(rows, 1), size)]


def _of_chunk(arguments: LossArguments, chunk: slice, rows: int) -> LossArguments:
    """The loss's arguments for those of its mixed and of its regularized rows that are in the chunk."""
    size, first_reg = chunk.stop - chunk.start, rows - arguments.num_reg
    num_mixed = min(max(arguments.num_mixed - chunk.start, 0), size)
    return arguments._replace(num_mixed=num_mixed, num_reg=min(max(chunk.stop - first_reg, 0), size))


def _without_eta_hat(target: RowTarget, arguments: LossArguments, like: Tensor) -> Tensor:
    """The loss's parts but for η̂, which the rows' gradients are multiplied by: targets alone tell."""
    kept = reference.kept_labels(target, like)
    counted = kept[like.shape[0] - arguments.num_reg :] == 1
    zeros = torch.zeros_like(kept)
    return reference.loss_of_rows(zeros, kept, zeros[: len(counted)], counted, arguments._replace(rescale=False))[1]


class _Gradients:
    """Those of hidden, weight and bias from those of chunks of the logits.

    Sums over chunks are float32 (float64), whatever the logits are.
    """

    def __init__(self, hidden: Tensor, needed: tuple[bool, ...], wide: torch.dtype):
        needs_hidden, self._needs_weight, self._needs_bias = needed
        self._wide = wide
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, chunk: slice, hidden: Tensor, weight: Tensor, dz: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[chunk] = dz @ weight
        if self._needs_weight:
            if self.weight is None:
                self.weight = (dz.t() @ hidden).to(self._wide)
            elif self.weight.dtype is dz.dtype:
                self.weight.addmm_(dz.t(), hidden)  # without memory for the chunk's share
            else:
                self.weight += dz.t() @ hidden
        if self._needs_bias:
            share = dz.sum(0, dtype=self._wide)
            self.bias = share if self.bias is None else self.bias.add_(share)

    def scale(self, rows: int, factor: Tensor) -> None:
        """Multiply those of the first ``rows``. A row of no part in the loss has a gradient of 0 even if ``factor`` is NaN."""
        if self.hidden is not None:
            before = self.hidden[:rows]
            before.copy_(reference.zero_where(before == 0, before * factor))
        for total in (self.weight, self.bias):
            if total is not None:
                total *= factor


def _evaluate(
    given: tuple[Tensor, Tensor, Tensor | None],
    target: RowTarget,
    arguments: LossArguments,
    dtype: torch.dtype,
    chunk_rows: int,
    needed: tuple[bool, ...],
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(loss, parts, the ``needed`` gradients of ``grad``·loss or of the loss) in one pass over chunks of the logits.

    η̂ is one factor of the whole gradient, known when the last chunk's rows are: what the others gave is multiplied by it then.
    """
    hidden, weight, bias = given
    matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    count, wide, options = hidden.shape[0], accumulate_dtype(dtype), arguments.of_backward()
    buffer = hidden.new_empty((min(chunk_rows, count), weight.shape[0]), dtype=dtype)
    rows = RowOutputs(*(hidden.new_empty(count, dtype=wide) for _ in range(3)))
    gradients = _Gradients(hidden, needed, wide)
    if any(needed):
        parts = _without_eta_hat(target, arguments, rows.ce)
        grad = torch.ones_like(parts[0]) if grad is None else grad
    for chunk in _chunks(count, chunk_rows):
        inputs, of_chunk = hidden[chunk].to(dtype), target.map(operator.itemgetter(chunk))
        logits = _logits(inputs, matrix, offset, buffer)
        outputs = ops.ce_entropy(logits, of_chunk, arguments.of_rows())
        for row, output in zip(rows, outputs, strict=True):
            row[chunk] = output
        if chunk.stop == count:
            loss, parts, signed = reference.penalized(rows, target, arguments)
            if chunk.start and arguments.rescale:
                gradients.scale(chunk.start, Parts(*parts.unbind()).eta_hat)
            signed = signed[chunk]
        elif any(needed):
            *_, signed = reference.penalized(outputs, of_chunk, _of_chunk(arguments, chunk, count))
        if any(needed):
            of_chunk_options = options._replace(num_mixed=_of_chunk(arguments, chunk, count).num_mixed)
            stats = LossStats(parts, signed, outputs.lse)
            ops.mixupe_loss_backward_out_op(grad, logits, *of_chunk, *stats, *of_chunk_options, out=logits)
            gradients.add(chunk, inputs, matrix, logits)
    found = (gradients.hidden, gradients.weight, gradients.bias)
    return (
        loss,
        parts,
        [None if part is None or of is None else part.to(of.dtype) for part, of in zip(found, given, strict=True)],
    )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden @ weightᵀ + bias into the first rows of ``out``, the one buffer that every chunk uses."""
    out = out[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


class _LinearLoss(torch.autograd.Function):
    """(loss, parts), with the gradients made in the forward: a backward that has to make the logits again takes 4/3 of the time.

    They are handed out once, as their new owner may write to them; another backward makes others. float16 logits wait for
    the upstream gradient: a loss scaler's factor keeps their gradient from underflowing.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, arguments, dtype, chunk_rows, needed):
        now = needed if dtype is not torch.float16 else (False,) * 3
        with _without_autocast(hidden.device.type):
            loss, parts, gradients = _evaluate((hidden, weight, bias), target, arguments, dtype, chunk_rows, now)
        ctx.gradients = gradients if now is needed else None
        ctx.save_for_backward(hidden, weight, bias, *target)
        ctx.arguments, ctx.dtype, ctx.chunk_rows = arguments, dtype, chunk_rows
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx, grad, _):
        nothing = (None,) * 5
        if grad is None:
            return None, None, None, *nothing
        hidden, weight, bias, labels, partner_labels, lam = ctx.saved_tensors
        given = hidden, weight, bias
        target, needed = RowTarget(labels, partner_labels, lam), ctx.needs_input_grad[:3]
        gradients, ctx.gradients = ctx.gradients, None
        if torch.is_grad_enabled():
            return *_twice_differentiable(given, target, ctx.arguments, ctx.dtype, needed, grad), *nothing
        if gradients is None:
            with _without_autocast(hidden.device.type):
                *_, gradients = _evaluate(given, target, ctx.arguments, ctx.dtype, ctx.chunk_rows, needed, grad)
        elif not ops.is_one(grad):
            gradients = [part if part is None else part.mul_(grad) for part in gradients]
        return *gradients, *nothing


def _twice_differentiable(
    given: tuple[Tensor, Tensor, Tensor | None],
    target: RowTarget,
    arguments: LossArguments,
    dtype: torch.dtype,
    needed: tuple[bool, ...],
    grad: Tensor,
) -> list[Tensor | None]:
    """The gradients as functions of hidden, weight and bias, by a loss of all logits at once."""
    with torch.enable_grad():
        hidden, weight = map(ops.alias, given[:2])  # the one may be made of the other, as with tied embeddings
        bias = None if given[2] is None else ops.alias(given[2])
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        loss, _ = ops.fused_loss(logits, target, arguments)
        parts = hidden, weight, bias
        wanted = [part for part, needs in zip(parts, needed, strict=True) if needs and part is not None]
        found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(found) if needs else None for needs in needed]


def linear_mixupe_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | tuple,
    *,
    bias: Tensor | None = None,
    eta: float | Tensor,
    clean_weight: float = 0.0,
    penalty: str = "abs",
    rescale: bool = True,
    threshold: float = 1.0,
    label_smoothing: float = 0.0,
    activation: str = "softmax",
    chunk_rows: int | None = None,
    process_group: Any = None,
    class_shards: ClassShards | None = None,
    step: StepRows | None = None,
) -> Tensor:
    """``mixupe_loss(hidden @ weight.T + bias, target, ...)`` without the (N, C) logits in memory.

    Logits are made, used and dropped ``chunk_rows`` rows at a time, in the forward, which makes the gradients, too. Beside
    these, peak extra memory is chunk_rows·C elements of the logits' dtype (a chunk, which its gradient replaces) and, where
    the logits are bfloat16 or float16, a copy of ``weight`` and float32 sums of its gradient. float16 logits are made again in
    the backward. Under torch.func, in forward mode, for second derivatives, with soft targets or λ that require a gradient,
    and with soft labels ignored in part, the logits are made all at once.

    Args:
        hidden: (N, D), floating point.
        weight: (C, D), as of ``torch.nn.Linear``.
        target: as for :func:`mixupe_loss`.
        bias: (C,) or None.
        eta, clean_weight, penalty, rescale, threshold, label_smoothing, activation: as for :func:`mixupe_loss`; penalties
            by name only.
        chunk_rows: rows of logits at a time, >= 1; as many as make 2^24 elements if None.
        process_group, step: as for :func:`mixupe_loss`.
        class_shards: as for :func:`mixupe_loss`, where each rank has the (own, D) rows of ``weight`` and (own,) of ``bias`` of its
            classes; DTensors of placement ``Shard(0)`` say it themselves. Every rank has the same ``hidden``, whose gradient
            is the whole one: the ranks' shares are summed by one all-reduce in the backward.

    Returns:
        0-d loss, differentiable any number of times in ``hidden``, ``weight``, ``bias``, soft targets and λ. Over ranks it
        has no second derivative.

    Raises:
        TypeError, ValueError: as :func:`mixupe_loss`, and for shapes that do not match.
    """
    ranks = None
    if process_group is not None or class_shards is not None or step is not None or is_dtensor(weight):
        over = Over(process_group, class_shards, step).check()
        hidden, weight, bias, target, ranks = linear_ranks.localized_linear(hidden, weight, bias, target, over)
    checks.tensor("hidden", hidden)
    checks.tensor("weight", weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (C, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    checks.same_device("weight", weight, "hidden", hidden)
    classes = weight.shape[0]
    checks.dtype("hidden", hidden, checks.LOGITS_DTYPES)
    checks.dtype("weight", weight, checks.LOGITS_DTYPES)
    if bias is not None:
        checks.tensor("bias", bias)
        checks.dtype("bias", bias, checks.LOGITS_DTYPES)
        checks.shape("bias", bias, (classes,))
        checks.same_device("bias", bias, "hidden", hidden)
    if chunk_rows is None:
        chunk_rows = max(1, _CHUNK_ELEMENTS // max(classes, 1))
    penalty = checks.choice("penalty", penalty, PENALTIES)  # no function here
    options = Options.check(clean_weight, penalty, rescale, threshold, label_smoothing, activation)
    chunk_rows = checks.positive_int("chunk_rows", chunk_rows)
    # An expanded scalar stands for the logits in the checks: their shape, dtype and device, and no memory.
    probe = F.linear(hidden[:0], weight, bias)
    like = probe.new_empty(()).expand(hidden.shape[0], classes)
    parsed = parse(like, target)
    if options.of_loss.sigmoid:
        check_multilabel(parsed.target)
    arguments = parsed.arguments(as_scalar("eta", eta, like), options)
    if ranks is not None:
        return linear_ranks.loss(hidden, weight, bias, target, parsed, arguments, like.dtype, chunk_rows, ranks)
    try:
        composed = ops.is_transformed(hidden) or is_composed(parsed.target)
        if debug.ON:
            debug.ran("linear loss", "composed" if composed else "linear")
        if composed:
            return composed_loss(F.linear(hidden, weight, bias), parsed.target, arguments)[0]
        arguments.check(like)
        parsed.target.check(like)
        # η may be rewritten before a backward, which is one of the η that was. No _replace: Dynamo of torch 2.11 rebuilds its
        # result as an empty tuple.
        arguments = LossArguments(arguments.eta.clone(), arguments.reg_weight.clone(), *arguments[2:])
        differentiated = (part is not None and part.requires_grad for part in (hidden, weight, bias))
        needed = tuple(torch.is_grad_enabled() and needs for needs in differentiated)
        return _LinearLoss.apply(hidden, weight, bias, parsed.target, arguments, like.dtype, chunk_rows, needed)[0]
    except (RuntimeError, TypeError, ValueError) as error:
        raise renamed(error, target) from None
