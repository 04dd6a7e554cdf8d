"""The loss as an expression over ce_entropy: for penalties and q of the caller's own, learned targets and torch.func."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks, ops
from ..conventions import penalty_of
from ..ops import LossArguments, RowOutputs, RowTarget, reference
from ..ops.ranks import ALONE, Ranks


def composed_loss(
    rows: Tensor,
    target: RowTarget,
    arguments: LossArguments,
    function: Callable[[Tensor], Tensor] | None = None,
    q: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """(loss, parts), differentiable any number of times, in either mode, in the logits, labels and λ.

    ``function`` of q̂ takes the place of the named penalty, and ``q`` (n,) that of q̂. ``ranks`` have other rows and classes.
    """
    arguments.check(rows)
    outputs, target, arguments = ranks.outputs(rows, target, arguments)
    fixed = outputs
    if penalty_of(arguments.penalty).detached and q is None and function is None and ranks.shard is None:
        fixed = ops.ce_entropy(rows, target.map(Tensor.detach), arguments.of_rows())
    return loss_of_outputs(outputs, fixed, target, arguments, function, q, ranks.merge)


def loss_of_outputs(
    outputs: RowOutputs,
    fixed: RowOutputs,
    target: RowTarget,
    arguments: LossArguments,
    function: Callable[[Tensor], Tensor] | None = None,
    q: Tensor | None = None,
    merge: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """The same from each row's CE, H and lse; ``fixed`` are those of a constant target."""
    # η may be rewritten before the backward, which is one of the η that was.
    arguments = arguments._replace(eta=arguments.eta.clone())
    penalty = penalty_of(arguments.penalty)
    if q is not None:
        q = _given(q, outputs.ce)
        counted = torch.ones_like(q, dtype=torch.bool)
    elif penalty.detached and function is None:
        # (y - p)ᵀz with y - p constant has the value q̂, no gradient in y, and in z that of q̂ with H constant.
        fixed = fixed._replace(entropy=fixed.entropy.detach())
        q, counted = reference.regularized(fixed, target.map(Tensor.detach), arguments)
    else:
        q, counted = reference.regularized(outputs, target, arguments)
    value = penalty.value(q, arguments.threshold) if function is None else _own_value(function, q)
    kept = reference.kept_labels(target, outputs.ce)
    return reference.loss_of_rows(outputs.ce, kept, value, counted, arguments, merge)


def _given(q: Tensor, ce: Tensor) -> Tensor:
    checks.tensor("q", q)
    checks.dtype("q", q, checks.LOGITS_DTYPES)
    checks.shape("q", q, (q.numel(),))
    checks.same_device("q", q, "logits", ce)
    return q.to(ce.dtype)


def _own_value(function: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    value = function(q)
    if not isinstance(value, Tensor):
        raise TypeError(f"penalty must return a tensor, got {type(value).__name__}")
    checks.dtype("penalty(q)", value, checks.LOGITS_DTYPES)
    checks.same_device("penalty(q)", value, "q", q)
    if value.shape != q.shape:
        raise ValueError(f"penalty must return one value for each of {tuple(q.shape)}, got {tuple(value.shape)}")
    return value
