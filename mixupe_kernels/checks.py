"""Checks of arguments, made before anything is computed. Each error names the argument, its value and what was expected.

Only shapes, dtypes, devices and Python numbers are looked at here: values of tensors are checked inside the operators
(on the CPU in the loop that reads them anyway, elsewhere by device-side asserts), because reading one back synchronises.
"""

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd import forward_ad

LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

NO_TENSOR = (
    "it is no tensor, but two labels a row and their weights. Write MixupELoss()(logits, target) for the loss, "
    "mixed_accuracy(logits, target) for the accuracy, metric.update(*clean_rows(logits, target)) for a metric of plain "
    "labels, target.dense(num_classes) for another loss of soft targets"
)  # of a MixedTarget where a tensor is expected
SLICED = (
    "write target.rows(start, stop) for a part of a target, and mix after what splits batches tensor by tensor, such as "
    "Accelerate's dispatch_batches"
)


def number(name: str, value, expected: str, accept) -> float:
    """``value`` as a float if it is a real number that ``accept`` takes, else TypeError or ValueError."""
    # The type first: to ask an abstract class takes 0.4 µs, and every loss asks for three numbers.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__} {value!r}")
    value = float(value)
    if value != value or not accept(value):  # NaN; math.isnan takes no symbol of a graph
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def positive(name: str, value) -> float:
    return number(name, value, "a number > 0", lambda v: 0 < v < math.inf)


def non_negative(name: str, value) -> float:
    return number(name, value, "a number >= 0", lambda v: 0 <= v < math.inf)


def fraction(name: str, value) -> float:
    return number(name, value, "a number in [0, 1]", lambda v: 0 <= v <= 1)


def positive_int(name: str, value) -> int:
    return integer(name, value, 1)


def integer(name: str, value, lowest: int | None = None) -> int:
    """``value`` as an int if it is a whole number, NumPy's among them, of at least ``lowest``, else TypeError or ValueError."""
    expected = "an int" if lowest is None else f"an int >= {lowest}"
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__} {value!r}")
    if lowest is not None and value < lowest:
        raise ValueError(f"{name} must be {expected}, got {value}")
    return int(value)


def named_arguments(elsewhere: Mapping[str, str]) -> Callable[[type], type]:
    """Let a class say, of a keyword that it does not take, which one is meant: of the same meaning, or of a similar name.

    Args:
        elsewhere: names of other libraries, and names that belong to another call, with what to write instead.
    """

    def decorate(cls: type) -> type:
        init = cls.__init__  # type: ignore[misc]
        taken = [name for name in inspect.signature(init).parameters if name != "self"]

        @functools.wraps(init)
        def __init__(self, *args, **kwargs):
            for name in kwargs:
                if name not in taken:
                    close = difflib.get_close_matches(name, taken, 1)
                    meant = elsewhere.get(name) or (f"{close[0]}=" if close else f"one of {', '.join(taken)}")
                    raise TypeError(f"{cls.__name__} has no argument {name!r}, write {meant}")
            init(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]
        return cls

    return decorate


def boolean(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return value


def choice(name: str, value, options: Collection[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def row_count(name: str, value, rows: int) -> int:
    """``value`` if it is a number of the first or last of so many rows."""
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if not 0 <= value <= rows:
        raise ValueError(f"{name} must be in [0, {rows}], got {value}")
    return value


def tensor(name: str, value) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    strided(name, value)
    return value


def strided(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def writable(name: str, value: Tensor) -> None:
    """Each element has memory of its own, as far as strides tell, and holds its own value and not the negative of one."""
    if value.is_neg():
        raise ValueError(f"{name} must not be a view with the negative bit (Tensor.is_neg)")
    reached = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)) if value.numel() else ():
        if size > 1 and stride <= reached:
            raise ValueError(f"{name} must not have elements that share memory, got strides {value.stride()}")
        reached += (size - 1) * stride


def dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    if value.shape != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


# "labels must be a class in [0, 9], got 12", after whatever a compiled backend puts before it.
_COMPLAINT = re.compile(r"\b([a-z_]+)( must (?:be|have|not) .*)")


def translate(error: Exception, names: Mapping[str, str] = MappingProxyType({})) -> Exception:
    """An operator's complaint about an argument as the ValueError or TypeError it stands for; other errors as they are.

    A compiled backend can only raise RuntimeError. ``names`` are the public names of arguments.
    """
    first_line = str(error).splitlines()[0] if str(error) else ""
    found = _COMPLAINT.search(first_line)
    if found is None or type(error) not in (RuntimeError, TypeError, ValueError):
        return error
    kind = TypeError if isinstance(error, TypeError) or found[2].startswith(" must have dtype ") else ValueError
    return kind(names.get(found[1], found[1]) + found[2])


def ids(ids: Tensor, labels: Tensor) -> None:
    """Raise unless ``ids`` are (B,) int64 on the device of the labels."""
    tensor("ids", ids)
    dtype("ids", ids, (torch.int64,))
    shape("ids", ids, labels.shape[:1])
    same_device("ids", ids, "labels", labels)


def has_tangent(value: Tensor) -> bool:
    """Whether forward mode, of ``forward_ad`` or ``torch.func.jvp``, is differentiating the value."""
    return forward_ad.unpack_dual(value).tangent is not None


def no_gradient(destination: str, **tensors: Tensor) -> None:
    """Refuse to write, into what the argument ``destination`` names, where autograd follows one of the tensors."""
    for name, value in tensors.items():
        if (torch.is_grad_enabled() and value.requires_grad) or has_tangent(value):
            raise ValueError(f"{name} must not require a gradient with {destination}")
