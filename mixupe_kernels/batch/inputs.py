"""What a batch may be made of, and what is done to each tensor of it on its way to the model."""

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..conventions import accumulate_dtype, constant, vector

if TYPE_CHECKING:
    from .mixup import Mixup

FORMATS = {torch.channels_last: 4, torch.channels_last_3d: 5}  # and the dimensions each is for


def mixes_by_default(value: Any, batch: int) -> bool:
    """Whether an entry is mixed where no ``keys`` are named: floating point, or uint8 of 4 or 5 dimensions (images,
    video), with one row for each sample."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return False
    if value.dim() == 0 or value.shape[0] != batch:
        return False
    return value.is_floating_point() or (value.dtype == torch.uint8 and value.dim() in (4, 5))


def as_dict(x: Mapping | Sequence) -> dict[Hashable, Any]:
    """The entries of ``x`` by key (of a mapping) or position."""
    return dict(x) if isinstance(x, Mapping) else dict(enumerate(x))


def entries_to_mix(
    x: Mapping | Sequence, batch: int, keys: Sequence[Hashable] | None, others: Sequence[Hashable]
) -> dict[Hashable, Tensor]:
    """The entries of ``x`` to mix: those in ``keys``, or else all that can be and are not among the ``others``.

    Raises:
        TypeError, ValueError: if one named in ``keys`` is missing or cannot be mixed, or there is none to mix.
    """
    entries = as_dict(x)
    if keys is None:
        chosen = {key: value for key, value in entries.items() if mixes_by_default(value, batch) and key not in others}
        if not chosen:
            raise ValueError(
                f"x must hold a floating-point tensor or uint8 images of {batch} rows to mix, got entries "
                f"{', '.join(map(repr, entries))}; keys= names others"
            )
        return chosen
    chosen = {}
    for key in keys:
        if key not in entries:
            raise ValueError(f"keys must name entries of x ({', '.join(map(repr, entries))}), got {key!r}")
        value = chosen[key] = checks.tensor(f"x[{key!r}]", entries[key])
        if value.dim() == 0 or value.shape[0] != batch:
            raise ValueError(f"x[{key!r}] must have {batch} rows, as labels have, got shape {tuple(value.shape)}")
    return chosen


def _num_rows(value: Any) -> int | None:
    """The rows of a tensor, an array or a list; None for what has none."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return shape[0] if len(shape) else None
    return len(value) if isinstance(value, (list, tuple)) else None


def entries_that_follow(
    x: Mapping | Sequence, batch: int, follow: Sequence[Hashable] | None, others: Container[Hashable], like: Tensor
) -> dict[Hashable, Any]:
    """The entries of ``x`` of which each row takes its own sample's: those in ``follow``, or else all with one row for
    each sample that are not among the ``others``.

    Raises:
        ValueError: if one named in ``follow`` is missing or has other rows, or one cannot be indexed by rows that are on the
            device of ``like`` without a synchronisation.
    """
    entries = as_dict(x)
    if follow is None:
        chosen = {k: value for k, value in entries.items() if k not in others and _num_rows(value) == batch}
    else:
        chosen = {key: entries[key] for key in follow if key in entries}
        for key in follow:
            if key not in entries:
                raise ValueError(f"follow must name entries of x ({', '.join(map(repr, entries))}), got {key!r}")
            if _num_rows(entries[key]) != batch:
                raise ValueError(f"x[{key!r}] must have {batch} rows to follow them, as labels have")
    for key, value in chosen.items():
        device = value.device if isinstance(value, Tensor) else torch.device("cpu")
        if device.type != like.device.type:
            raise ValueError(
                f"x[{key!r}] must be on the device of labels, {like.device}, to follow the rows, got {device}; "
                "follow= names the entries that do"
            )
    return chosen


def rows_of(value: Any, rows: Tensor) -> Any:
    """The ``rows`` of a tensor, an array, a list or a tuple."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows)
    if hasattr(value, "shape"):
        return value[rows.tolist()]
    return type(value)([value[row] for row in rows.tolist()])


def replaced(x: Any, changes: dict[Hashable, Any]) -> dict | Sequence:
    """A copy of ``x`` with some entries replaced, the others being the same objects: a dict of a mapping."""
    if isinstance(x, Mapping):
        return {**x, **changes}
    values = [changes.get(position, value) for position, value in enumerate(x)]
    return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)


def buffers(out: Mapping | Sequence | None, entries: dict[Hashable, Tensor]) -> dict[Hashable, Tensor | None]:
    """The buffer of each entry to mix, by its key or position; ValueError if one has none."""
    if out is None:
        return dict.fromkeys(entries)
    if isinstance(out, Tensor) or not isinstance(out, (Mapping, Sequence)):
        raise TypeError(f"out must be a tuple, list or dict of tensors, as x is, got {type(out).__name__}")
    given = as_dict(out)
    for key in entries:
        if key not in given:
            raise ValueError(f"out must have a buffer for each of {', '.join(map(repr, entries))}, {key!r} is missing")
    return given


def check_buffer(name: str, out: Any, x: Tensor, rows: int, dtypes: Sequence[torch.dtype]) -> Tensor:
    """``out`` if ``rows`` rows like x's can be written into it.

    Raises:
        TypeError, ValueError: if it has another kind, device, shape or dtype, shares memory with itself, or requires a gradient.
    """
    checks.tensor(name, out)
    checks.same_device(name, out, "x", x)
    checks.no_gradient("out", **{name: out})
    if out.dim() != x.dim() or out.shape[0] < rows or out.shape[1:] != x.shape[1:]:
        expected = ", ".join(map(str, x.shape[1:]))
        raise ValueError(f"{name} must have shape (>= {rows}, {expected}), got {tuple(out.shape)}")
    checks.dtype(name, out, dtypes)
    checks.writable(name, out)
    return out


def image_size(samples: Iterable[Tensor]) -> tuple[int, int]:
    """Height and width, the same for all ``samples``; ValueError if they are not."""
    sizes = {tuple(x.shape[-2:]) if x.dim() >= 3 else () for x in samples}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            f"x must have shape (B, ..., H, W), one H and W for all, with cutmix_alpha, got {sorted(sizes)}"
        )
    height, width = sizes.pop()
    return height, width


class Arguments(NamedTuple):
    """The transform as ``mix`` takes it."""

    scale: Tensor | None
    shift: Tensor | None
    dtype: torch.dtype | None
    memory_format: torch.memory_format | None


UNCHANGED = Arguments(None, None, None, None)


class Transform:
    """f(x) = (x - mean) / std per channel (dimension 1), in a dtype and a memory format.

    uint8 is divided by 255 first, as by torchvision's ``to_dtype(scale=True)``, and becomes float32 if no dtype is given.
    With neither mean and std nor a dtype it stays uint8, for whatever normalises afterwards. A floating-point dtype stays if
    none is given.
    """

    def __init__(self, mean, std, dtype: torch.dtype | None, memory_format: torch.memory_format | None):
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must be given together, got mean={mean!r} and std={std!r}")
        self.mean = None if mean is None else self._numbers("mean", mean)
        self.std = None if std is None else self._numbers("std", std, positive=True)
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"std must have as many values as mean ({len(self.mean)}), got {len(self.std)}")
        if dtype is not None and dtype not in checks.LOGITS_DTYPES:
            raise ValueError(f"dtype must be float32, float64, bfloat16, float16 or None, got {dtype}")
        if memory_format not in (None, torch.contiguous_format, *FORMATS):
            raise ValueError(
                f"memory_format must be contiguous_format, channels_last, channels_last_3d or None, got {memory_format}"
            )
        self.dtype = dtype
        self.memory_format = memory_format
        self.is_identity = self.mean is self.dtype is self.memory_format is None

    @staticmethod
    def _numbers(name: str, values, positive: bool = False) -> tuple[float, ...]:
        values = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise TypeError(f"{name} must be a sequence of numbers, one for each channel, got {values!r}")
        if positive:
            return tuple(checks.positive(f"{name}[{i}]", value) for i, value in enumerate(values))
        return tuple(checks.number(f"{name}[{i}]", value, "a number", lambda v: True) for i, value in enumerate(values))

    def arguments(self, name: str, x: Tensor, normalise: bool) -> Arguments:
        """What ``mix`` is to be called with for ``x``, whose values are normalised or, with False, only cast.

        Raises:
            TypeError, ValueError: if x has another dtype, or not the channels or dimensions the transform is for.
        """
        if self.is_identity and x.dtype in checks.LOGITS_DTYPES:
            return UNCHANGED
        if x.dtype is not torch.uint8:
            checks.dtype(name, x, checks.LOGITS_DTYPES)
        if self.memory_format in FORMATS and x.dim() not in FORMATS.values() and normalise:
            raise ValueError(f"{name} must have 4 or 5 dimensions for {self.memory_format}, got {x.dim()}")
        memory_format = self.memory_format
        if memory_format is not None and FORMATS.get(memory_format, x.dim()) != x.dim():
            memory_format = None
        mean, std, per = self.mean if normalise else None, self.std, 1.0
        dtype = self.dtype
        if x.dtype == torch.uint8 and not (self.mean is self.dtype is None):
            per, dtype = 255.0, dtype or torch.float32
            if mean is None:
                channels = x.shape[1] if x.dim() >= 2 else 1
                mean, std = (0.0,) * channels, (1.0,) * channels
        if mean is None or std is None:
            return Arguments(None, None, dtype, memory_format)
        if x.dim() < 2 or x.shape[1] != len(mean):
            raise ValueError(f"{name} must have shape (B, {len(mean)}, ...), got {tuple(x.shape)}")
        compute = accumulate_dtype(x.dtype)
        key = (mean, std, per, compute, x.device)
        scale = constant(("scale", *key), lambda: vector([1 / (per * s) for s in std], compute, x.device))
        shift = constant(
            ("shift", *key), lambda: vector([-m / s for m, s in zip(mean, std, strict=True)], compute, x.device)
        )
        return Arguments(scale, shift, dtype, memory_format)


def check_out(mixer: "Mixup", name: str, out: Tensor | None, x: Tensor, arguments: Arguments) -> Tensor | None:
    """The buffer that a mixer is to write, checked; None for fresh memory."""
    if out is None and not mixer.inplace:
        return None
    checks.no_gradient("inplace" if mixer.inplace else "out", x=x)
    dtype = arguments.dtype or x.dtype
    if mixer.inplace:
        if out is not None:
            raise ValueError("out must be None with inplace, got a tensor")
        if dtype != x.dtype:
            raise ValueError(f"x must have dtype {dtype} with inplace, which keeps it, got {x.dtype}")
        return x
    if mixer.num_samples > 2:
        raise ValueError("out must be None with num_samples > 2, got a tensor")
    free = mixer.transform.dtype is None and dtype is not torch.uint8
    allowed = checks.LOGITS_DTYPES if free else (dtype,)
    return check_buffer(name, out, x, mixer.num_rows(x.shape[0]), allowed)
