"""Accuracy on a batch of mixed and clean rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..conventions import IGNORE_INDEX, check_range
from ..target import MixedTarget, as_rows


class MixedAccuracy(NamedTuple):
    """Accuracies in [0, 1], one for each k of ``topk``, as detached tensors on the device; NaN over no rows."""

    mixed: Tensor
    clean: Tensor


def mixed_accuracy(logits: Tensor, target: MixedTarget, topk: int | Sequence[int] = (1,)) -> MixedAccuracy:
    """Top-k accuracy: λ-weighted over the mixed rows, λ·[own label found] + (1 - λ)·[partner's found], plain over the clean.

    A label of -100, or a soft one that is all 0, has no part in it: its weight, λ or 1 - λ, leaves the mean. Nothing is read
    back from the device.

    Args:
        logits: (N, C).
        target: of the N rows. Soft labels count as their largest class.
        topk: k in [1, C], or several.

    Returns:
        ``(mixed, clean)``, each of shape (len(topk),), float32.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value.
    """
    right, weight = right_and_weight(logits, target, topk)
    split = target.num_mixed
    parts = []
    for rows in (slice(split), slice(split, None)):
        parts.append(torch.stack([found[rows].sum() / weight[rows].sum() for found in right]))
    return MixedAccuracy(*parts)


def right_and_weight(
    logits: Tensor, target: MixedTarget, topk: int | Sequence[int] = (1,)
) -> tuple[list[Tensor], Tensor]:
    """Of each row the share of its labels that is found among the k largest logits, (N,) for each k, and its weight, (N,).

    The weight is 1 but for labels that are ignored. Arguments and errors are :func:`mixed_accuracy`'s.
    """
    logits, split = _rows(logits, target), target.num_mixed
    own, own_kept = _classes("target.labels", target.labels, logits)
    partner, partner_kept = _classes("target.partner_labels", target.partner_labels, logits)
    lam = target.lam.detach().float()
    if split < lam.shape[0]:  # a clean row has its own label alone
        lam = torch.cat([lam[:split], torch.ones_like(lam[split:])])
    own_weight, partner_weight = lam * own_kept, (1 - lam) * partner_kept
    ks = _check_topk(topk, logits.shape[1])
    best, right = logits.topk(max(ks), dim=1).indices, []
    for k in ks:
        found, found_partner = ((best[:, :k] == labels.unsqueeze(1)).any(1) for labels in (own, partner))
        right.append(own_weight * found + partner_weight * found_partner)
    return right, own_weight + partner_weight


def clean_rows(logits: Tensor, target: MixedTarget) -> tuple[Tensor, Tensor]:
    """The clean rows alone, as a metric of plain labels takes them: ``metric.update(*clean_rows(logits, target))``.

    Args:
        logits: (N, C).
        target: of the N rows.

    Returns:
        Views: logits (n, C) and labels (n,), or (n, C) if they are soft; of no rows where the batch has no clean ones.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value.
    """
    rows = _rows(logits, target)
    checks.shape("target.labels", target.labels, (rows.shape[0], *target.labels.shape[1:]))
    return rows[target.num_mixed :], target.labels[target.num_mixed :]


def _rows(logits: Tensor, target: MixedTarget) -> Tensor:
    """The logits, detached, if they and the target's λ and counts are as they must be."""
    checks.tensor("logits", logits)
    checks.dtype("logits", logits, checks.LOGITS_DTYPES)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
    logits = as_rows(logits).detach()
    if not isinstance(target, MixedTarget):
        raise TypeError(f"target must be a MixedTarget, got {type(target).__name__}")
    rows = logits.shape[0]
    checks.tensor("target.lam", target.lam)
    checks.dtype("target.lam", target.lam, checks.LOGITS_DTYPES)
    checks.shape("target.lam", target.lam, (rows,))
    checks.same_device("target.lam", target.lam, "logits", logits)
    check_range("target.lam", target.lam, 0, 1, "in [0, 1]")
    checks.row_count("target.num_mixed", target.num_mixed, rows)
    return logits


def _classes(name: str, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each row, (N,) int64, and whether it has one, (N,) bool."""
    checks.tensor(name, labels)
    checks.same_device(name, labels, "logits", logits)
    if labels.is_floating_point():
        checks.shape(name, labels, logits.shape)
        return labels.argmax(1), (labels != 0).any(1)
    checks.dtype(name, labels, (torch.int64,))
    checks.shape(name, labels, logits.shape[:1])
    return labels, labels != IGNORE_INDEX


def _check_topk(topk: int | Sequence[int], classes: int) -> Sequence[int]:
    ks: Sequence[int] = topk if isinstance(topk, tuple | list) else (topk,)
    if not ks:
        raise ValueError("topk must have at least one k, got none")
    for k in ks:
        if checks.positive_int("topk", k) > classes:
            raise ValueError(f"topk must be at most the {classes} classes, got {k}")
    return ks
