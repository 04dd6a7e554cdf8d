"""Classifier and loss as one: for large C the (N, C) logits never exist at once."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, debug, ops
from ..conventions import PENALTIES, accumulate_dtype
from ..ops import LossStats, RowGradients, RowOutputs, RowStats, RowTarget, reference
from ..target import as_scalar, check_multilabel, is_composed, parse, renamed
from .composed import composed_loss
from .options import Options

# Logits of one chunk by default: 2^24 elements are 64 MiB of float32, large enough for the matrix product to run at full
# speed, small beside any model.
_CHUNK_ELEMENTS = 2**24


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _of_chunk(target: RowTarget, chunk: slice) -> RowTarget:
    return target.map(lambda part: part[chunk])


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden @ weightᵀ + bias into the first rows of ``out``, the one buffer that every chunk uses."""
    out = out[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, arguments, dtype, chunk_rows):
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        count, classes = hidden.shape[0], weight.shape[0]
        buffer = hidden.new_empty((min(chunk_rows, count), classes), dtype=dtype)
        rows = RowOutputs(*(hidden.new_empty(count, dtype=accumulate_dtype(dtype)) for _ in range(3)))
        with _without_autocast(hidden.device.type):
            for chunk in _chunks(count, chunk_rows):
                logits = _logits(hidden[chunk].to(dtype), matrix, offset, buffer)
                outputs = ops.ce_entropy(logits, _of_chunk(target, chunk), arguments.of_rows())
                for row, output in zip(rows, outputs, strict=True):
                    row[chunk] = output
        loss, parts, signed_entropy = reference.penalized(rows, target, arguments)
        ctx.save_for_backward(hidden, weight, bias, *target, parts, signed_entropy, rows.lse)
        ctx.dtype, ctx.chunk_rows, ctx.options = dtype, chunk_rows, arguments.of_backward()
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_mixupe_loss is differentiable once: for create_graph=True use mixupe_loss of the logits"
            )
        hidden, weight, bias, labels, partner_labels, lam, *stats = ctx.saved_tensors
        target, stats, options = RowTarget(labels, partner_labels, lam), LossStats(*stats), ctx.options
        coefficients = reference.loss_coefficients(grad, target, stats, options)
        entropy, _ = reference.split_sign(stats.signed_entropy)
        matrix, offset = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        buffer = hidden.new_empty((min(ctx.chunk_rows, hidden.shape[0]), weight.shape[0]), dtype=ctx.dtype)
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # Sums over chunks are float32 (float64), whatever the logits are.
        wide = accumulate_dtype(ctx.dtype)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for chunk in _chunks(hidden.shape[0], ctx.chunk_rows):
            inputs = hidden[chunk].to(ctx.dtype)
            logits = _logits(inputs, matrix, offset, buffer)
            grads = RowGradients(*(None if of_row is None else of_row[chunk] for of_row in coefficients))
            row_stats = RowStats(entropy[chunk], stats.lse[chunk])
            dz = ops.ce_entropy_backward(grads, logits, row_stats, _of_chunk(target, chunk), options.of_rows())
            if d_hidden is not None:
                d_hidden[chunk] = dz @ matrix
            if d_weight is not None:
                d_weight += dz.t() @ inputs
            if d_bias is not None:
                d_bias += dz.sum(0, dtype=wide)
            del dz  # or it would still be held while the next chunk's is made
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


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
) -> Tensor:
    """``mixupe_loss(hidden @ weight.T + bias, target, ...)`` without the (N, C) logits in memory.

    Logits are made, used and dropped ``chunk_rows`` rows at a time, in the forward and again in the backward. Beside the
    gradients, peak extra memory is 2·chunk_rows·C elements of the logits' dtype (a chunk and its gradient) and, where
    the logits are bfloat16 or float16, a copy of ``weight`` and float32 sums of its gradient. Under torch.func, in forward
    mode, with soft targets or λ that require a gradient, and with soft labels ignored in part, the logits are made all at once.

    Args:
        hidden: (N, D), floating point.
        weight: (C, D), as of ``torch.nn.Linear``.
        target: as for :func:`mixupe_loss`.
        bias: (C,) or None.
        eta, clean_weight, penalty, rescale, threshold, label_smoothing, activation: as for :func:`mixupe_loss`; penalties
            by name only.
        chunk_rows: rows of logits at a time, >= 1; as many as make 2^24 elements if None.

    Returns:
        0-d loss, differentiable once in ``hidden``, ``weight``, ``bias``, soft targets and λ, and under torch.func any
        number of times.

    Raises:
        TypeError, ValueError: as :func:`mixupe_loss`, and for shapes that do not match.
    """
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
    if options.sigmoid:
        check_multilabel(parsed.target)
    arguments = parsed.arguments(as_scalar("eta", eta, like), options)
    try:
        composed = ops.is_transformed(hidden) or is_composed(parsed.target)
        if debug.ON:
            debug.ran("linear loss", "composed" if composed else "linear")
        if composed:
            return composed_loss(F.linear(hidden, weight, bias), parsed.target, arguments)[0]
        arguments.check(like)
        parsed.target.check(like)
        return _LinearLoss.apply(hidden, weight, bias, parsed.target, arguments, like.dtype, chunk_rows)[0]
    except (RuntimeError, TypeError, ValueError) as error:
        raise renamed(error, target) from None
