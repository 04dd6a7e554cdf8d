"""torchmetrics: accuracy on mixed targets as a metric, and any other metric on the clean rows."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .. import checks
from ..loss.accuracy import clean_rows, right_and_weight
from ..target import MixedTarget

ROWS = ("all", "mixed", "clean")


class MixedAccuracy(Metric):
    """:func:`mixed_accuracy` over all batches of an epoch and all processes: a 0-d tensor, NaN over no rows.

    Args:
        top_k: k >= 1.
        rows: ``"all"``, or the ``"mixed"`` or ``"clean"`` ones alone.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.

    ``update(logits, target)`` takes (N, C) logits and a :class:`MixedTarget`, or plain labels (N,), which are clean rows: the
    same metric serves validation.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    weight: Tensor

    def __init__(self, top_k: int = 1, rows: str = "all", **kwargs: Any):
        super().__init__(**kwargs)
        self.top_k = checks.positive_int("top_k", top_k)
        self.rows = checks.choice("rows", rows, ROWS)
        # Sums of batches in float32: an error of 1e-7 in what is shown to four places.
        self.add_state("right", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: MixedTarget | Tensor) -> None:
        if isinstance(target, Tensor):
            ones = torch.ones(target.shape[:1], dtype=torch.float32, device=target.device)
            target = MixedTarget(target, target, ones, 0, 0, 0.0)
        (right,), weight = right_and_weight(logits, target, self.top_k)
        split = target.num_mixed
        chosen = {"all": slice(None), "mixed": slice(split), "clean": slice(split, None)}[self.rows]
        self.right += right[chosen].sum()
        self.weight += weight[chosen].sum()

    def compute(self) -> Tensor:
        return self.right / self.weight


class OnCleanRows(Metric):
    """Any metric of plain labels, given the clean rows of each batch and their labels; a batch without any adds nothing.

    Args:
        metric: a ``torchmetrics.Metric``, or a collection of them.

    ``update(logits, target)`` takes a :class:`MixedTarget`, or plain labels, which go to the metric as they are. A call returns
    the metric of this batch as well, None if it has no clean rows.
    """

    full_state_update = True

    def __init__(self, metric: Any):
        super().__init__()
        self.metric = metric

    def update(self, logits: Tensor, target: MixedTarget | Tensor) -> None:
        if isinstance(target, MixedTarget):
            logits, target = clean_rows(logits, target)
        if target.shape[0]:
            self.metric.update(logits, target)

    def forward(self, logits: Tensor, target: MixedTarget | Tensor) -> Any:
        """By the metric's own: torchmetrics' would reset the metric, whose sums it does not know of, for each batch."""
        if isinstance(target, MixedTarget):
            logits, target = clean_rows(logits, target)
        self._computed = None
        self._update_count += 1
        self._forward_cache = self.metric(logits, target) if target.shape[0] else None
        return self._forward_cache

    def compute(self) -> Any:
        return self.metric.compute()

    def reset(self) -> None:
        super().reset()
        self.metric.reset()
