"""The target of a mixed batch: two labels a row and the weight of the first."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, reference


class MixedTarget(NamedTuple):
    """The target of a batch of N rows: two labels a row and the weight of the first. A pytree.

    The first ``num_mixed`` rows carry the mixup loss and the last ``num_reg`` carry the regularizer. A clean row has its
    own label twice and λ = 1.

    Attributes:
        labels: (N,) int64 classes, or (N, C) soft labels, of the rows' own samples.
        partner_labels: the same, of the samples they are mixed with.
        lam: (N,) float32 in [0, 1], the weight of the own sample.
        num_mixed: rows of the mixup loss.
        num_reg: rows of the regularizer.
        reg_weight: the regularizer's weight w (MixupE, eq. 7): a float or a 0-d tensor.
    """

    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    num_mixed: int
    num_reg: int
    reg_weight: Tensor | float

    def to(self, *args, **kwargs) -> "MixedTarget":
        """Every tensor moved as by :meth:`torch.Tensor.to`; a dtype applies to the floating-point ones."""

        def move(value):
            if not isinstance(value, Tensor):
                return value
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            if dtype is None or not value.is_floating_point():
                dtype = value.dtype
            return value.to(device or value.device, dtype, non_blocking=non_blocking)

        return MixedTarget(*map(move, self))

    def dense(self, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
        """The targets λ·y + (1 - λ)·y_partner as (N, num_classes) float32 (mixup, eq. 1), labels smoothed before.

        Raises:
            ValueError: if soft labels do not have ``num_classes`` columns, or a label lies outside [0, num_classes).
        """
        return _dense(self.labels, self.partner_labels, self.lam, num_classes, label_smoothing)


def _dense(labels: Tensor, partner_labels: Tensor, lam: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    checks.positive_int("num_classes", num_classes)
    label_smoothing = checks.fraction("label_smoothing", label_smoothing)
    lam = lam.float()
    if labels.is_floating_point():
        checks.shape("labels", labels, (labels.shape[0], num_classes))
        soft = torch.lerp(partner_labels.float(), labels.float(), lam.reshape(-1, 1))
        return soft * (1 - label_smoothing) + label_smoothing / num_classes
    rows = labels.new_empty((labels.shape[0], num_classes), dtype=torch.float32, device=labels.device)
    lam = lam.expand(labels.shape[0])
    reference.check_classes(labels, partner_labels, num_classes, reference.IGNORE_INDEX)
    return reference.dense_target(rows, labels, partner_labels, lam, None, label_smoothing)


def one_hot(labels: Tensor, num_classes: int | None) -> Tensor:
    """(B, C) float32 of class indices, or of soft labels as they are; an ignored label's row is 0."""
    if labels.is_floating_point():
        return labels.float()
    if num_classes is None:
        raise ValueError("num_classes must be given with num_samples > 2 and class labels, got None")
    if not torch.compiler.is_compiling():  # a graph leaves it to scatter's own check
        reference.check_classes(labels, None, num_classes, reference.IGNORE_INDEX)
    kept = (labels != reference.IGNORE_INDEX).unsqueeze(1)
    rows = torch.zeros(labels.shape[0], num_classes, device=labels.device)
    return rows.scatter_(1, labels.unsqueeze(1).where(kept, 0), kept.float())


def check_labels(labels: Tensor, batch: int, like: Tensor) -> None:
    """Raise unless ``labels`` are (batch,) int64 or (batch, C) floating point on the device of ``like``."""
    usual = type(labels) is Tensor and labels.dtype is torch.int64 and labels.dim() == 1
    if usual and labels.shape[0] == batch and labels.device == like.device:
        return  # one look instead of six calls in every step
    checks.tensor("labels", labels)
    if labels.dim() == 0 or labels.shape[0] != batch:
        raise ValueError(f"labels must have one row for each of the {batch} samples, got shape {tuple(labels.shape)}")
    if labels.is_floating_point():
        if labels.dim() != 2:
            raise ValueError(f"soft labels must have shape (B, C), got {tuple(labels.shape)}")
    else:
        checks.dtype("labels", labels, (torch.int64,))
    checks.same_device("labels", labels, "x", like)


def check_ids(ids: Tensor, labels: Tensor) -> None:
    """Raise unless ``ids`` are (B,) int64 on the device of the labels."""
    checks.tensor("ids", ids)
    checks.dtype("ids", ids, (torch.int64,))
    checks.shape("ids", ids, labels.shape[:1])
    checks.same_device("ids", ids, "labels", labels)


def mix_labels(
    labels: Tensor, partner: Tensor, lam: Tensor | float, num_classes: int, label_smoothing: float = 0.0
) -> Tensor:
    """Mixed soft labels: λ_i y_i + (1 - λ_i) y_partner(i) (mixup, Zhang et al., 2018, eq. 1).

    Args:
        labels: (B,) int64 classes in [0, num_classes), or (B, num_classes) soft labels.
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
    checks.shape("partner", partner, labels.shape[:1])
    reference.check_range("partner", partner, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
    if isinstance(lam, Tensor):
        reference.check_range("lam", lam, 0, 1, "in [0, 1]")
    else:
        lam = torch.full((), checks.fraction("lam", lam), device=labels.device)
    return _dense(labels, labels[partner], lam, num_classes, label_smoothing)
