"""The target of a mixed batch: two labels a row and the weight of the first."""

import functools
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .conventions import IGNORE_INDEX, accumulate_dtype, check_range, kept, moved, scalar, wide_dtype
from .ops import LossArguments, RowOptions, RowTarget, reference


class MixedTarget(NamedTuple):
    """The target of a batch of N rows: two labels a row and the weight of the first. A pytree.

    The first ``num_mixed`` rows carry the mixup loss and the last ``num_reg`` carry the regularizer. A clean row has its
    own label twice and λ = 1.

    It is a tuple of six and ``len`` says so: torch.compile compiles anew for each length of a tuple, whatever it is as a
    pytree, and libraries go over a tuple by ``range(len(t))``. :attr:`shape` and :attr:`num_rows` are those of the rows,
    :meth:`rows` slices them and :meth:`cat` joins targets. Code that slices each tensor of a tuple by itself (accelerate's
    dispatched batches) leaves the counts, so mix after it. Containers that rebuild a tuple keep it: it is made of six
    arguments or of one iterable of six, and ``torch.load(weights_only=True)`` takes it once this package is imported.

    Attributes:
        labels: (N,) int64 classes, or (N, C) soft labels, of the rows' own samples.
        partner_labels: the same, of the samples they are mixed with. A class of -100 is ignored; beside soft labels,
            (N,) int64 of -100 say that of each row only the share λ, of those labels, is not.
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

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a MixedTarget has no attribute {name!r}: {checks.NO_TENSOR}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls for a function that was given one: losses and metrics of plain labels."""
        raise TypeError(f"torch.{getattr(function, '__name__', function)} takes no MixedTarget: {checks.NO_TENSOR}")

    def rows(self, start: int, stop: int | None = None) -> "MixedTarget":
        """The target of the rows ``start:stop``, bounds as in a slice; views of these."""
        total = self.num_rows
        start, stop, _ = slice(start, stop).indices(total)
        stop = max(start, stop)
        labels, partner_labels, lam = (value[start:stop] for value in self[:3])
        num_mixed = max(0, min(stop, self.num_mixed) - start)
        num_reg = max(0, stop - max(start, total - self.num_reg))
        return MixedTarget(labels, partner_labels, lam, num_mixed, num_reg, self.reg_weight)

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
        labels, partner_labels, lam = (
            torch.cat(parts) for parts in zip(*(target[:3] for target in targets), strict=True)
        )
        joined = cls(
            labels,
            partner_labels,
            lam,
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

        return MixedTarget._make(map(move, self))

    def pin_memory(self) -> "MixedTarget":
        """Every tensor in pinned memory, as by :meth:`torch.Tensor.pin_memory`."""
        return MixedTarget._make(value.pin_memory() if isinstance(value, Tensor) else value for value in self)

    def dense(self, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
        """The targets λ·y + (1 - λ)·y_partner as (N, num_classes) float32 (mixup, eq. 1), labels smoothed before.

        Raises:
            ValueError: if soft labels do not have ``num_classes`` columns, or a label lies outside [0, num_classes).
        """
        return dense(self.labels, self.partner_labels, self.lam, num_classes, label_smoothing)


_from_fields = MixedTarget.__new__


@functools.wraps(_from_fields)  # the signature, for help and completion
def _from_fields_or_iterable(cls, labels, *others, **named) -> MixedTarget:
    if len(others) == 5 and not named:
        return tuple.__new__(cls, (labels, *others))  # as _from_fields does; every step makes one
    if not others and not named and not isinstance(labels, Tensor):
        return cls._make(labels)  # what containers do: type(value)(element for element in value)
    return _from_fields(cls, labels, *others, **named)


MixedTarget.__new__ = _from_fields_or_iterable  # type: ignore[method-assign, assignment]  # NamedTuple lets no body define it
torch.serialization.add_safe_globals([MixedTarget])


def dense(labels: Tensor, partner_labels: Tensor, lam: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    checks.positive_int("num_classes", num_classes)
    label_smoothing = checks.fraction("label_smoothing", label_smoothing)
    lam = lam.float().expand(labels.shape[0])
    if labels.dim() > (2 if labels.is_floating_point() else 1):
        raise ValueError(f"labels must be (N,) classes or (N, C) soft labels to be dense, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        checks.shape("labels", labels, (labels.shape[0], num_classes))
        soft, _, share = _soft_target(labels, partner_labels, lam, labels, ops.is_transformed(labels))
        soft = soft * (1 - label_smoothing) + label_smoothing / num_classes
        return soft if share is None else soft * share.unsqueeze(1)
    rows = labels.new_empty((labels.shape[0], num_classes), dtype=torch.float32, device=labels.device)
    target = RowTarget(labels, partner_labels, lam)
    target.check_values(num_classes, IGNORE_INDEX)
    return reference.dense_target(rows, target, RowOptions(label_smoothing=label_smoothing))


def check_labels(labels: Tensor, batch: int, like: Tensor) -> None:
    """Raise unless ``labels`` are (batch,) int64 or (batch, C) floating point on the device of ``like``."""
    usual = type(labels) is Tensor and labels.dtype is torch.int64 and labels.dim() == 1 and not labels.is_nested
    if usual and labels.layout is torch.strided and labels.shape[0] == batch and labels.device == like.device:
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


class Parsed(NamedTuple):
    """Logits (N, C) and their target as the operators take them, with the rows of L_mix, the rows of R, and w.

    ``transformed``: a transform of torch.func or forward mode is at work, and may differentiate in any of them.
    """

    rows: Tensor
    target: RowTarget
    num_mixed: int
    num_reg: int
    reg_weight: Tensor | float
    transformed: bool

    def arguments(self, eta: Tensor, options: Any) -> LossArguments:
        """The loss's, with η and the ``Options`` of it."""
        weight = self.reg_weight
        if (
            type(weight) is not Tensor
            or weight.dtype is not eta.dtype
            or weight.device != eta.device
            or weight.requires_grad
        ):
            weight = as_scalar("target.reg_weight", weight, eta)
        return LossArguments(eta, weight, self.num_mixed, self.num_reg, *options.of_loss)


def parse(logits: Tensor, target: Tensor | tuple, class_dim: int = -1) -> Parsed:
    """Logits (..., C) and what stands for their target, flattened to rows; every form of the loss begins here.

    ``target`` is a MixedTarget, or for plain cross-entropy on every row class indices, soft targets, or (labels,
    partner_labels, lam). The operators check devices, dtypes, values and the shapes of rows; checked here is what they do not
    see: the shapes of what is flattened. Soft labels are mixed here: one (N, C) tensor.
    """
    if not isinstance(logits, Tensor) or logits.is_nested:
        checks.tensor("logits", logits)
    if class_dim != -1:
        logits, target = _classes_last(logits, target, class_dim)
    rows = logits if logits.dim() == 2 else as_rows(logits)
    count, transformed = rows.shape[0], ops.is_transformed(logits)
    if isinstance(target, MixedTarget):
        labels, partner_labels, lam, num_mixed, num_reg, reg_weight = target
        if logits.dim() != 2 or not type(num_mixed) is type(num_reg) is int:
            num_mixed, num_reg = _row_counts(target, logits, count)
    elif isinstance(target, Tensor):
        return Parsed(rows, _plain_target(target, logits), count, 0, 0.0, transformed)
    else:
        labels, partner_labels, lam = _triple(target)
        num_mixed, num_reg, reg_weight = count, 0, 0.0
    compute = torch.float64 if logits.dtype is torch.float64 else torch.float32
    usual = type(labels) is type(partner_labels) is type(lam) is Tensor and lam.dtype is compute
    if not usual or labels.is_nested or partner_labels.is_nested or lam.is_nested:
        lam = _check_parts(labels, partner_labels, lam).to(compute)
    if labels.is_floating_point():
        soft, _, share = row_target = _soft_target(labels, partner_labels, lam, logits, transformed)
        if logits.dim() != 2:
            row_target = RowTarget(soft.reshape(-1, rows.shape[1]), None, None if share is None else share.reshape(-1))
    elif logits.dim() == 2:
        row_target = RowTarget(labels, partner_labels, lam)
    else:
        checks.shape("target.labels", labels, logits.shape[:-1])
        checks.shape("target.partner_labels", partner_labels, labels.shape)
        row_target = RowTarget(labels.reshape(-1), partner_labels.reshape(-1), _lam_of(lam, labels).reshape(-1))
    return Parsed(rows, row_target, num_mixed, num_reg, reg_weight, transformed)


def as_rows(logits: Tensor) -> Tensor:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., C) with C >= 1, got {tuple(logits.shape)}")
    return logits.reshape(-1, logits.shape[-1])


def _classes_last(logits: Tensor, target: Tensor | tuple, class_dim: int) -> tuple[Tensor, Tensor | tuple]:
    """The logits, and soft labels with them, with their dimension of classes moved to the end."""
    if not -logits.dim() <= class_dim < logits.dim():
        raise ValueError(
            f"class_dim must be a dimension of the logits, of shape {tuple(logits.shape)}, got {class_dim}"
        )

    def moved(labels):
        soft = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == logits.dim()
        return labels.movedim(class_dim, -1) if soft else labels

    if isinstance(target, MixedTarget):
        target = target._replace(labels=moved(target.labels), partner_labels=moved(target.partner_labels))
    elif isinstance(target, Tensor):
        target = moved(target)
    elif isinstance(target, tuple | list):
        target = tuple(map(moved, target))
    return logits.movedim(class_dim, -1), target


def _plain_target(target: Tensor, logits: Tensor) -> RowTarget:
    checks.tensor("target", target)
    checks.same_device("target", target, "logits", logits)
    if target.is_floating_point():
        checks.shape("target", target, logits.shape)
        return RowTarget(target.to(accumulate_dtype(logits.dtype)).reshape(-1, logits.shape[-1]))
    if logits.dim() != 2:
        checks.shape("target", target, logits.shape[:-1])
    return RowTarget(target.reshape(-1) if target.dim() > 1 and logits.dim() != 2 else target)


def _triple(target: Any) -> tuple:
    """(labels, partner_labels, lam), where λ may be one number for all samples."""
    if not isinstance(target, tuple | list) or len(target) != 3:
        found = type(target).__name__ + (f" of {len(target)}" if isinstance(target, tuple | list) else "")
        raise TypeError(f"target must be a MixedTarget, a tensor or (labels, partner_labels, lam), got {found}")
    labels, partner_labels, lam = target
    checks.tensor("target.labels", labels)
    if not isinstance(lam, Tensor):
        lam = checks.fraction("target.lam", lam)
        lam = torch.full((), lam, dtype=wide_dtype(labels.device), device=labels.device)
    return labels, partner_labels, lam.expand(labels.shape[:1]) if lam.dim() == 0 else lam


def _check_parts(labels: Tensor, partner_labels: Tensor, lam: Tensor) -> Tensor:
    """λ, of a dtype that converts to the operators'."""
    for name, part in (("labels", labels), ("partner_labels", partner_labels), ("lam", lam)):
        checks.tensor(f"target.{name}", part)
    checks.dtype("target.lam", lam, checks.LOGITS_DTYPES)
    return lam


def _row_counts(target: MixedTarget, logits: Tensor, rows: int) -> tuple[int, int]:
    """The rows of L_mix and of R, each sample being as many rows as the logits have between N and C."""
    batch = logits.shape[0]

    per_sample, counts = rows // batch if batch else 0, (target.num_mixed, target.num_reg)
    num_mixed, num_reg = map(checks.row_count, ("target.num_mixed", "target.num_reg"), counts, (batch, batch))
    return num_mixed * per_sample, num_reg * per_sample


def _lam_of(lam: Tensor, labels: Tensor) -> Tensor:
    """λ of each label (B, ...) from one a sample, (B,), or from one a label."""
    if lam.shape == labels.shape:
        return lam
    checks.shape("target.lam", lam, labels.shape[:1])
    return lam.view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)


def _soft_target(labels: Tensor, partner_labels: Tensor, lam: Tensor, logits: Tensor, transformed: bool) -> RowTarget:
    """The mixture of soft labels; or labels of which only the share λ is not ignored."""
    mixed = partner_labels.dim() == labels.dim()
    if not labels.shape == partner_labels.shape == logits.shape:
        checks.shape("target.labels", labels, logits.shape)
        checks.shape("target.partner_labels", partner_labels, labels.shape if mixed else labels.shape[:-1])
    if not labels.device == partner_labels.device == lam.device == logits.device:
        for name, part in (("labels", labels), ("partner_labels", partner_labels), ("lam", lam)):
            checks.same_device(f"target.{name}", part, "logits", logits)
    if not transformed and not torch.compiler.is_compiling():  # neither has values to look at
        check_range("target.lam", lam, 0, 1, "in [0, 1]")
        if not mixed:
            ignored = f"{IGNORE_INDEX} beside soft labels"
            check_range("target.partner_labels", partner_labels, IGNORE_INDEX, IGNORE_INDEX, ignored)
    weight = lam if lam.shape == labels.shape[:-1] else _lam_of(lam, labels[..., 0])
    if not mixed:
        return RowTarget(labels.to(lam.dtype), None, weight)
    return RowTarget(torch.lerp(partner_labels.to(lam.dtype), labels.to(lam.dtype), weight.unsqueeze(-1)))


def is_composed(target: RowTarget) -> bool:
    """Whether the target is more than the fused loss takes: differentiated, too, or dense of rows ignored in part."""
    labels, lam = target.labels, target.lam
    if lam is None:
        return labels.requires_grad and torch.is_grad_enabled()
    return labels.dim() == 2 or (lam.requires_grad and torch.is_grad_enabled())


def check_multilabel(target: RowTarget) -> None:
    if not target.labels.is_floating_point():
        raise TypeError("target must be floating point (..., C) for a sigmoid model, got class indices")


_scalars: dict[Hashable, Tensor] = {}


def as_scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A non-negative number as a 0-d tensor of the compute dtype beside ``like``. Numbers are converted once."""
    compute, device = torch.float64 if like.dtype is torch.float64 else torch.float32, like.device
    if type(value) is float and not torch.compiler.is_compiling():  # looked up, a graph's number would be its constant
        found = _scalars.get((value, compute, device))
        if found is not None:
            return found
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: the loss is not differentiable in it")
        if value.is_complex():
            raise TypeError(f"{name} must have a real dtype, got {value.dtype}")
        if value.is_meta and device.type != "meta":
            raise ValueError(f"{name} must have a value, got a meta tensor")
        return moved(name, value, device, compute)
    number = checks.non_negative(name, value)
    return kept(_scalars, (number, compute, device), lambda: scalar(number, compute, device))


_MIXED_NAMES = {name: f"target.{name}" for name in MixedTarget._fields}
_PLAIN_NAMES = {"labels": "target"}


def renamed(error: Exception, target: Tensor | tuple) -> Exception:
    """An operator's complaint as one about the part of the public ``target`` that it means."""
    error = checks.translate(error, _PLAIN_NAMES if isinstance(target, Tensor) else _MIXED_NAMES)
    sliced = str(error).startswith("target.num_") and isinstance(error, ValueError)
    return ValueError(f"{error}: {checks.SLICED}") if sliced else error
