"""What every room agrees on: dtypes, layouts, penalties, and small constant tensors."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default

# Before torch 2.13 Dynamo takes torch.compiler.is_exporting() for true in every graph that it traces
# (pytorch/pytorch#176347), and can trace no Gamma variates.
OLD_COMPILER = torch.__version__ < "2.13"


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


_HAVE_FLOAT64 = ("cpu", "cuda", "meta")  # Apple's GPUs have none, nor have all of Intel's


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums of many terms and rare draws are made in: float64, or float32 on a device that may have none."""
    return torch.float64 if device.type in _HAVE_FLOAT64 else torch.float32


def row_format(x: Tensor) -> torch.memory_format:
    """channels_last where each sample of x is so and not contiguous as well, else contiguous: what outputs keep."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    first = x[:1]
    if channels_last and not first.is_contiguous() and first.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def check_range(name: str, values: Tensor, low, high, expected: str) -> None:
    """Raise on the CPU, assert on CUDA, where reading a value back would synchronise; other devices have no such assert."""
    if values.device.type not in ("cpu", "cuda"):
        return
    inside = ((values >= low) & (values <= high)).all()
    if values.device.type == "cpu":
        if not bool(inside):
            bad = values[~((values >= low) & (values <= high))][0].item()
            raise ValueError(f"{name} must be {expected}, got {bad}")
    else:
        torch._assert_async(inside)


# Small tensors, made once for each device: making an ``arange`` costs as much as mixing a small batch. What is kept must hold
# for every later caller: on another stream, and in a CUDA graph, which reads a tensor where it lay when it was captured.

_LIMIT = 128  # entries: a few for each batch size in use
_tensors: dict[Hashable, Tensor] = {}


_Key = TypeVar("_Key", bound=Hashable)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()


def kept(cache: dict[_Key, Tensor], key: _Key, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it returned for ``key`` before.

    While a CUDA graph is captured, ``make`` becomes part of the graph; so it may read no memory of the host: see ``vector``.
    """
    if torch.compiler.is_compiling():
        return make()  # the compiler folds it, or keeps it in the graph
    found = cache.get(key)
    if found is None:
        with torch.inference_mode(False):  # autograd refuses to save tensors made in inference mode
            found = make()
        if _can_be_kept(found, cache):
            cache[key] = found
    return found


def scalar(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor. A graph takes a number that changes as the factor of a product; of ``torch.full`` it is a constant."""
    return torch.ones((), dtype=dtype, device=device) * number


def _can_be_kept(made: Tensor, cache: dict[Any, Tensor]) -> bool:
    if type(made) is not Tensor or torch.func.debug_unwrap(made) is not made:
        return False  # it belongs to a transform of torch.func, or to a tracer
    if made.is_cpu:
        if len(cache) >= _LIMIT:
            for key in [key for key, old in cache.items() if old.is_cpu]:
                del cache[key]
        return True
    if len(cache) >= _LIMIT or is_capturing(made.device):
        return False  # a graph may read what is there; and what a graph makes is there when it is replayed
    if made.device.type in ("cuda", "xpu"):
        torch.accelerator.current_stream(made.device).synchronize()  # once, and every stream finds it made
    return True


def rewritten(
    cache: dict[_Key, Tensor], key: _Key, device: torch.device, make: Callable[[], Tensor], whose: str
) -> Tensor:
    """As ``kept``, for a tensor that is written again when its value changes, so that graphs read the new one.

    Raises:
        RuntimeError: if it would be made while a CUDA graph is captured: each replay would write the old value.
    """
    if key not in cache and is_capturing(device):
        raise RuntimeError(f"{whose} must be called once on {device}, to warm up, before a CUDA graph is captured")
    return kept(cache, key, make)


def vector(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers as a tensor. To a device they go as arguments of kernels: a copy from the host's memory waits."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device=device)
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def moved(name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``value`` on a device, in a dtype, without waiting: from the CPU to CUDA out of pinned memory.

    Raises:
        RuntimeError: if a CUDA graph is being captured, which would read the CPU's memory at every replay.
    """
    if device.type == "cuda" and value.is_cpu and not torch.compiler.is_compiling():
        if is_capturing(device):
            raise RuntimeError(f"{name} must be on {device} while a CUDA graph is captured, got cpu")
        if type(value) is Tensor and not value.requires_grad and not value.is_pinned():
            value = value.to(dtype).pin_memory()
    return value.to(device, dtype, non_blocking=True)


def constant(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it returned for ``key`` and the default dtype before. Callers must not write to it, nor hand it
    out."""
    return kept(_tensors, (key, torch.get_default_dtype()), make)


def sequence(size: int, device: torch.device) -> Tensor:
    """0, 1, ..., size - 1 as int64."""
    return constant(("sequence", size, device), lambda: torch.arange(size, device=device))
