"""What every room agrees on: dtypes, layouts, penalties, and small constant tensors."""

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default


class Penalty(NamedTuple):
    """What R averages: a function of (q̂, threshold), and its slope, the derivative in q̂ that the backward uses.

    A slope is -1, 0 or 1 for every q̂ but NaN: a loss keeps it for its backward as the sign of the entropy
    (``reference.sign_entropy``). With ``detached``, p is a constant in q̂ = (y - p)ᵀz.
    """

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]
    detached: bool = False


# Name → penalty. Operators take its number, the place here; the same rows are in ops/triton/rows.py and csrc/.
PENALTIES: dict[str, Penalty] = {
    "abs": Penalty(lambda q, threshold: q.abs(), lambda q, threshold: q.sign()),
    "threshold": Penalty(
        lambda q, threshold: torch.where(q >= threshold, 0.0, -q), lambda q, threshold: -(q < threshold).to(q.dtype)
    ),
    "linear_detached": Penalty(lambda q, threshold: -q, lambda q, threshold: -torch.ones_like(q), detached=True),
}


def penalty_of(number: int) -> Penalty:
    """The penalty that an operator's number stands for."""
    return tuple(PENALTIES.values())[number]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an operator computes in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_format(x: Tensor) -> torch.memory_format:
    """channels_last where each sample of x is so and not contiguous as well, else contiguous: what outputs keep."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    first = x[:1]
    if channels_last and not first.is_contiguous() and first.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def check_range(name: str, values: Tensor, low, high, expected: str) -> None:
    """Raise on the CPU, assert on the device elsewhere: reading a value back would synchronise."""
    inside = ((values >= low) & (values <= high)).all()
    if values.device.type == "cpu":
        if not bool(inside):
            bad = values[~((values >= low) & (values <= high))][0].item()
            raise ValueError(f"{name} must be {expected}, got {bad}")
    elif values.device.type != "meta":
        torch._assert_async(inside)


# Small constant tensors, made once for each device: making an ``arange`` costs as much as mixing a small batch.

_LIMIT = 128  # entries: a few for each batch size in use
_tensors: dict[Hashable, Tensor] = {}


_Key = TypeVar("_Key", bound=Hashable)


def kept(cache: dict[_Key, Tensor], key: _Key, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it returned for ``key`` before."""
    if torch.compiler.is_compiling():
        return make()  # the compiler folds it, or keeps it in the graph
    found = cache.get(key)
    if found is None:
        with torch.inference_mode(False):  # autograd refuses to save tensors made in inference mode
            found = make()
        if len(cache) >= _LIMIT:
            cache.clear()
        # A tensor made under a transform of torch.func belongs to the transform.
        if torch.func.debug_unwrap(found) is found:
            cache[key] = found
    return found


def scalar(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor. A graph takes a number that changes as the factor of a product; of ``torch.full`` it is a constant."""
    return torch.ones((), dtype=dtype, device=device) * number


def constant(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it returned for ``key`` and the default dtype before. Callers must not write to it, nor hand it
    out."""
    return kept(_tensors, (key, torch.get_default_dtype()), make)


def sequence(size: int, device: torch.device) -> Tensor:
    """0, 1, ..., size - 1 as int64."""
    return constant(("sequence", size, device), lambda: torch.arange(size, device=device))
