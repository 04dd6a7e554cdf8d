"""The target of a mixed batch: two labels a row and the weight of the first."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .conventions import IGNORE_INDEX, accumulate_dtype, check_range
from .ops import reference


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
    if labels.dim() > (2 if labels.is_floating_point() else 1):
        raise ValueError(f"labels must be (N,) classes or (N, C) soft labels to be dense, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        checks.shape("labels", labels, (labels.shape[0], num_classes))
        soft = torch.lerp(partner_labels.float(), labels.float(), lam.reshape(-1, 1))
        return soft * (1 - label_smoothing) + label_smoothing / num_classes
    rows = labels.new_empty((labels.shape[0], num_classes), dtype=torch.float32, device=labels.device)
    lam = lam.expand(labels.shape[0])
    reference.check_classes(labels, partner_labels, num_classes, IGNORE_INDEX)
    return reference.dense_target(rows, labels, partner_labels, lam, None, label_smoothing)


def one_hot(labels: Tensor, num_classes: int | None) -> Tensor:
    """(B, C) float32 of class indices, or of soft labels as they are.

    Raises:
        ValueError: for an ignored label: a dense target has no way to say that its row is in no mean.
    """
    if labels.is_floating_point():
        return labels.float()
    if num_classes is None:
        raise ValueError("num_classes must be given with num_samples > 2 and class labels, got None")
    if not torch.compiler.is_compiling():  # a graph leaves it to scatter's own check
        expected = f"a class in [0, {num_classes - 1}] with num_samples > 2, which can ignore none"
        check_range("labels", labels, 0, num_classes - 1, expected)
    rows = torch.zeros(labels.shape[0], num_classes, dtype=torch.float32, device=labels.device)
    return rows.scatter_(1, labels.unsqueeze(1), 1.0)


def check_labels(labels: Tensor, batch: int, like: Tensor) -> None:
    """Raise unless ``labels`` are (batch,) int64 or (batch, C) floating point on the device of ``like``."""
    usual = type(labels) is Tensor and labels.dtype is torch.int64 and labels.dim() == 1
    if usual and labels.layout is torch.strided and labels.shape[0] == batch and labels.device == like.device:
        return  # one look instead of six calls in every step
    checks.tensor("labels", labels)
    checks.strided("labels", labels)
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
    checks.strided("ids", ids)
    checks.dtype("ids", ids, (torch.int64,))
    checks.shape("ids", ids, labels.shape[:1])
    checks.same_device("ids", ids, "labels", labels)


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
    checks.shape("partner", partner, labels.shape[:1])
    check_range("partner", partner, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
    if labels.dim() == 2:
        labels = labels.float()
    if isinstance(lam, Tensor):
        check_range("lam", lam, 0, 1, "in [0, 1]")
    else:
        lam = torch.full((), checks.fraction("lam", lam), dtype=torch.float32, device=labels.device)
    return _dense(labels, labels[partner], lam, num_classes, label_smoothing)


class Target(NamedTuple):
    """A target as the operators take it: (N,) indices, two of them with ``lam``, or dense (N, C)."""

    target: Tensor
    partner: Tensor | None = None
    lam: Tensor | None = None


def _needs_nothing(labels, partner, lam, logits: Tensor) -> bool:
    """Whether a MixedTarget already is what the operators take: the case of every step, so it is asked first (2 µs)."""
    return (
        isinstance(labels, Tensor)
        and isinstance(partner, Tensor)
        and isinstance(lam, Tensor)
        and labels.dtype is partner.dtype is torch.int64
        and lam.dtype is accumulate_dtype(logits.dtype)
        and labels.shape == partner.shape == lam.shape == logits.shape[:-1]
        and labels.dim() == 1
        and labels.device == partner.device == lam.device == logits.device
    )


def as_target(target: Tensor | tuple, logits: Tensor, name: str = "target") -> Target:
    """Check a MixedTarget, class indices or soft targets against ``logits`` (..., C), and flatten to rows.

    Soft labels of a MixedTarget are mixed here, λ·labels + (1 - λ)·partner_labels: one (N, C) tensor.
    """
    compute, leading = accumulate_dtype(logits.dtype), logits.shape[:-1]
    if not isinstance(target, tuple):
        checks.tensor(name, target)
        checks.same_device(name, target, "logits", logits)
        if target.is_floating_point():
            checks.shape(name, target, logits.shape)
            return Target(target.to(compute).reshape(-1, logits.shape[-1]))
        checks.dtype(name, target, (torch.int64,))
        checks.shape(name, target, leading)
        return Target(target.reshape(-1))
    labels, partner, lam = target[:3]
    if _needs_nothing(labels, partner, lam, logits):
        return Target(labels, partner, lam)
    for part, value in ((f"{name}.labels", labels), (f"{name}.partner_labels", partner), (f"{name}.lam", lam)):
        checks.tensor(part, value)
        checks.same_device(part, value, "logits", logits)
    checks.shape(f"{name}.partner_labels", partner, labels.shape)
    checks.shape(f"{name}.lam", lam, labels.shape[:1])
    lam = lam.to(compute)
    if labels.is_floating_point():
        checks.shape(f"{name}.labels", labels, logits.shape)
        weight = lam.view(-1, *[1] * (labels.dim() - 1))
        mixed = torch.lerp(partner.to(compute), labels.to(compute), weight)
        return Target(mixed.reshape(-1, logits.shape[-1]))
    checks.dtype(f"{name}.labels", labels, (torch.int64,))
    checks.dtype(f"{name}.partner_labels", partner, (torch.int64,))
    checks.shape(f"{name}.labels", labels, leading)
    if labels.dim() > 1:
        lam = lam.view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)
    return Target(labels.reshape(-1), partner.reshape(-1), lam.reshape(-1))


def as_rows(logits: Tensor) -> Tensor:
    """Check ``logits`` (..., C) and view them as (N, C)."""
    checks.tensor("logits", logits)
    checks.dtype("logits", logits, checks.LOGITS_DTYPES)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., C) with C >= 1, got {tuple(logits.shape)}")
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def as_multilabel(target: Target) -> Target:
    if target.target.dim() != 2:
        raise TypeError("target must be floating point (..., C) for a sigmoid model, got class indices")
    return target
