"""The target of a mixed batch: two labels a row and the weight of the first."""

import functools
from collections.abc import Iterable
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

    It is a tuple of six and ``len`` says so: torch.compile compiles anew for each length of a tuple, and libraries go over
    a tuple by its length. :attr:`shape` and :attr:`num_rows` are those of the rows, :meth:`rows` slices them and :meth:`cat`
    joins targets. Containers that rebuild a tuple keep it: it is made of six arguments or of one iterable of six, and
    ``torch.load(weights_only=True)`` takes it once this package is imported.

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

    @property
    def shape(self) -> torch.Size:
        """Of the labels: (N,), or (N, C) if they are soft."""
        return self.labels.shape

    @property
    def num_rows(self) -> int:
        """N."""
        return self.labels.shape[0]

    def rows(self, start: int, stop: int | None = None) -> "MixedTarget":
        """The target of the rows ``start:stop``, bounds as in a slice; views of these."""
        total = self.num_rows
        start, stop, _ = slice(start, stop).indices(total)
        stop = max(start, stop)
        parts = (value[start:stop] for value in self[:3])
        num_mixed = max(0, min(stop, self.num_mixed) - start)
        num_reg = max(0, stop - max(start, total - self.num_reg))
        return MixedTarget(*parts, num_mixed, num_reg, self.reg_weight)

    @classmethod
    def cat(cls, targets: Iterable["MixedTarget"]) -> "MixedTarget":
        """One target of the rows of several, in their order.

        Raises:
            TypeError: for something else than MixedTargets.
            ValueError: for none, or if mixed rows would no longer come before clean ones, the regularizer's rows would not
                be the last, or its weights differ.
        """
        if not isinstance(targets, Iterable) or isinstance(targets, Tensor):
            raise TypeError(f"targets must be MixedTargets, got {type(targets).__name__}")
        targets = list(targets)
        for target in targets:
            if not isinstance(target, cls):
                raise TypeError(f"targets must be MixedTargets, got {type(target).__name__}")
        if not targets:
            raise ValueError("targets must hold at least one MixedTarget, got none")
        first, total = targets[0], sum(target.num_rows for target in targets)
        joined = cls(
            *(torch.cat(parts) for parts in zip(*(target[:3] for target in targets), strict=True)),
            sum(target.num_mixed for target in targets),
            sum(target.num_reg for target in targets),
            first.reg_weight,
        )
        begin = 0
        for target in targets:
            part = joined.rows(begin, begin := begin + target.num_rows)
            if (part.num_mixed, part.num_reg) != (target.num_mixed, target.num_reg):
                raise ValueError(
                    f"targets must have mixed rows first and the regularizer's last of all {total} when joined, got "
                    f"(num_mixed, num_reg) = {', '.join(str(target[3:5]) for target in targets)}"
                )
            if target.num_reg and target.reg_weight is not first.reg_weight and target.reg_weight != first.reg_weight:
                raise ValueError(
                    f"targets must have one reg_weight, got {float(first.reg_weight)} and {float(target.reg_weight)}"
                )
        return joined

    def to(self, *args, **kwargs) -> "MixedTarget":
        """Every tensor moved as by :meth:`torch.Tensor.to`; a dtype applies to the floating-point ones."""
        device = torch.empty(0).to(*args, **kwargs).device
        flags = [value for value in args if isinstance(value, bool)]  # non_blocking and copy
        named = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        named = {**dict(zip(("non_blocking", "copy"), flags, strict=False)), **named}

        def move(value):
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            return value.to(device, **named)

        return MixedTarget(*map(move, self))

    def pin_memory(self) -> "MixedTarget":
        """Every tensor in pinned memory, as by :meth:`torch.Tensor.pin_memory`."""
        return MixedTarget(*(value.pin_memory() if isinstance(value, Tensor) else value for value in self))

    def dense(self, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
        """The targets λ·y + (1 - λ)·y_partner as (N, num_classes) float32 (mixup, eq. 1), labels smoothed before.

        Raises:
            ValueError: if soft labels do not have ``num_classes`` columns, or a label lies outside [0, num_classes).
        """
        return _dense(self.labels, self.partner_labels, self.lam, num_classes, label_smoothing)


_from_fields = MixedTarget.__new__


@functools.wraps(_from_fields)  # the signature, for help and completion
def _from_fields_or_iterable(cls, *args, **kwargs) -> MixedTarget:
    if len(args) == 1 and not kwargs and not isinstance(args[0], Tensor):
        args = tuple(args[0])  # what containers do: type(value)(element for element in value)
    return _from_fields(cls, *args, **kwargs)


MixedTarget.__new__ = _from_fields_or_iterable  # type: ignore[method-assign]  # NamedTuple lets no body define it
torch.serialization.add_safe_globals([MixedTarget])


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
