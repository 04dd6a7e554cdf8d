"""Labels as the dense targets that mixing makes of them."""

import torch
from torch import Tensor

from .. import checks
from ..conventions import IGNORE_INDEX, check_range
from ..target import check_labels, dense


def one_hot(labels: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor | None]:
    """(B, C) float32 of class indices, and which are not ignored, (B,) bool; of soft labels these as they are, and None.

    The row of an ignored label is 0.
    """
    if labels.is_floating_point():
        return labels.float(), None
    if num_classes is None:
        raise ValueError("num_classes must be given with num_samples > 2 and class labels, got None")
    kept = labels != IGNORE_INDEX
    labels = labels.where(kept, 0)
    if not torch.compiler.is_compiling():  # a graph leaves it to scatter's own check
        check_range("labels", labels, 0, num_classes - 1, f"a class in [0, {num_classes - 1}]")
    rows = torch.zeros(labels.shape[0], num_classes, dtype=torch.float32, device=labels.device)
    return rows.scatter_(1, labels.unsqueeze(1), kept.unsqueeze(1).float()), kept


def share_of_kept(weights: Tensor, kept: Tensor) -> Tensor:
    """Of rows' weights (N, K) those of the samples whose labels are not ignored, (N,): 1 exactly where all are that count."""
    return torch.where((kept | (weights == 0)).all(1), 1.0, (weights * kept).sum(1))


def mix_labels(
    labels: Tensor, partner: Tensor, lam: Tensor | float, num_classes: int, label_smoothing: float = 0.0
) -> Tensor:
    """Mixed soft labels: λ_i y_i + (1 - λ_i) y_partner(i) (mixup, Zhang et al., 2018, eq. 1).

    Args:
        labels: (B,) int64 classes in [0, num_classes), or (B, num_classes) soft labels, floating point or int64 as one_hot's.
        partner: (B,) int64 in [0, B).
        lam: weight of the own label in [0, 1]: a float, a 0-d tensor or (B,).
        num_classes: C.
        label_smoothing: in [0, 1].

    Returns:
        (B, C) float32.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or value.
    """
    checks.tensor("labels", labels)
    checks.tensor("partner", partner)
    check_labels(labels, labels.shape[0] if labels.dim() else 0, partner)
    checks.dtype("partner", partner, (torch.int64,))
    checks.shape("partner", partner, labels.shape[:1])
    check_range("partner", partner, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
    if labels.dim() == 2:
        labels = labels.float()
    if isinstance(lam, Tensor):
        checks.tensor("lam", lam)
        checks.dtype("lam", lam, checks.LOGITS_DTYPES)
        if lam.dim():
            checks.shape("lam", lam, labels.shape[:1])
        checks.same_device("lam", lam, "labels", labels)
        check_range("lam", lam, 0, 1, "in [0, 1]")
    else:
        lam = torch.full((), checks.fraction("lam", lam), dtype=torch.float32, device=labels.device)
    return dense(labels, labels[partner], lam, num_classes, label_smoothing)
