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
    checks.tensor("logits", logits)
    checks.dtype("logits", logits, checks.LOGITS_DTYPES)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
    logits = as_rows(logits).detach()
    if not isinstance(target, MixedTarget):
        raise TypeError(f"target must be a MixedTarget, got {type(target).__name__}")
    rows, classes = logits.shape
    own, own_kept = _classes("target.labels", target.labels, logits)
    partner, partner_kept = _classes("target.partner_labels", target.partner_labels, logits)
    checks.tensor("target.lam", target.lam)
    checks.dtype("target.lam", target.lam, checks.LOGITS_DTYPES)
    checks.shape("target.lam", target.lam, (rows,))
    checks.same_device("target.lam", target.lam, "logits", logits)
    check_range("target.lam", target.lam, 0, 1, "in [0, 1]")
    split = target.num_mixed
    if isinstance(split, bool) or not isinstance(split, int | torch.SymInt):
        raise TypeError(f"target.num_mixed must be an int, got {type(split).__name__} {split!r}")
    if not 0 <= split <= rows:
        raise ValueError(f"target.num_mixed must be in [0, {rows}], got {split}")
    ks = _check_topk(topk, classes)
    best = logits.topk(max(ks), dim=1).indices
    lam = target.lam.detach().float()
    own_weight, partner_weight = lam * own_kept, (1 - lam) * partner_kept
    mixed, clean = [], []
    for k in ks:
        found, found_partner = ((best[:, :k] == labels.unsqueeze(1)).any(1) for labels in (own, partner))
        right = own_weight * found + partner_weight * found_partner
        mixed.append(right[:split].sum() / (own_weight + partner_weight)[:split].sum())
        clean.append((found & own_kept)[split:].sum() / own_kept[split:].sum())
    return MixedAccuracy(torch.stack(mixed), torch.stack(clean))


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
