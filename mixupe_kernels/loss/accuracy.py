"""Accuracy on a batch of mixed and clean rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..target import MixedTarget, as_rows


class MixedAccuracy(NamedTuple):
    """Accuracies in [0, 1], one for each k of ``topk``, as detached tensors on the device; NaN over no rows."""

    mixed: Tensor
    clean: Tensor


def mixed_accuracy(logits: Tensor, target: MixedTarget, topk: Sequence[int] = (1,)) -> MixedAccuracy:
    """Top-k accuracy: λ-weighted over the mixed rows, λ·[own label found] + (1 - λ)·[partner's found], plain over the clean.

    Nothing is read back from the device.

    Args:
        logits: (N, C).
        target: of the N rows. Soft labels count as their largest class.
        topk: each k in [1, C].

    Returns:
        ``(mixed, clean)``, each of shape (len(topk),), float32.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value.
    """
    logits = as_rows(logits).detach()
    if not isinstance(target, MixedTarget):
        raise TypeError(f"target must be a MixedTarget, got {type(target).__name__}")
    checks.shape("target.lam", target.lam, logits.shape[:1])
    for k in topk:
        if checks.positive_int("topk", k) > logits.shape[1]:
            raise ValueError(f"topk must be at most the {logits.shape[1]} classes, got {k}")
    own, partner = (
        labels.argmax(1) if labels.is_floating_point() else labels for labels in (target.labels, target.partner_labels)
    )
    best = logits.topk(max(topk), dim=1).indices
    lam = target.lam.float()
    split = target.num_mixed
    mixed, clean = [], []
    for k in topk:
        found_own, found_partner = ((best[:, :k] == labels.unsqueeze(1)).any(1).float() for labels in (own, partner))
        mixed.append((lam * found_own + (1 - lam) * found_partner)[:split].mean())
        clean.append(found_own[split:].mean())
    return MixedAccuracy(torch.stack(mixed), torch.stack(clean))
