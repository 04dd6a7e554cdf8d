"""A case made concrete: its data, a call for each contender, and the check of each result."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import check

ETA = 1e-3  # the paper's usual η (MixupE, §4.1)


class Workload(NamedTuple):
    """A case made concrete.

    Attributes:
        inputs: a NamedTuple of tensors and numbers, the argument of every call.
        calls: contender -> function of inputs to a tuple of result tensors.
        check: (contender, inputs, results) -> largest deviation from the reference; raises where it is too large.
        bytes_moved: the floor, what an ideal kernel would read and write.
        trains: whether calls differentiate what is no input, a model of their own.
    """

    inputs: tuple
    calls: dict[str, Callable[[tuple], tuple[Tensor, ...]]]
    check: Callable[[str, tuple, tuple[Tensor, ...]], float]
    bytes_moved: int
    trains: bool = False

    @property
    def needs_grad(self) -> bool:
        return self.trains or any(isinstance(value, Tensor) and value.requires_grad for value in self.inputs)


def within(error: float, dtype: torch.dtype, what: str) -> float:
    if not error <= check.TOLERANCE[dtype]:
        raise ValueError(
            f"{what} deviates from the float64 reference by {error:.2g}, allowed {check.TOLERANCE[dtype]:g}"
        )
    return error
