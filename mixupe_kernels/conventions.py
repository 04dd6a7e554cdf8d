"""What every room agrees on: dtypes, layouts, names, and small constant tensors."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default
PENALTIES = ("abs", "threshold", "linear_detached")


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


def constant(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it returned for ``key`` before. Callers must not write to it, nor hand it out."""
    # The compiler folds it, or keeps it in the graph; under a transform of torch.func it belongs to the transform.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return make()
    found = _tensors.get(key)
    if found is None:
        with torch.inference_mode(False):  # autograd refuses to save tensors made in inference mode
            found = make()
        if len(_tensors) >= _LIMIT:
            _tensors.clear()
        _tensors[key] = found
    return found


def sequence(size: int, device: torch.device) -> Tensor:
    """0, 1, ..., size - 1 as int64."""
    return constant(("sequence", size, device), lambda: torch.arange(size, device=device))
