"""The options that every form of the loss shares."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import checks
from ..conventions import PENALTIES

ACTIVATIONS = ("softmax", "sigmoid")


class Options(NamedTuple):
    """Checked options of the loss. A ``function`` of the caller's takes the place of the penalty of that number."""

    penalty: int
    function: Callable[[Tensor], Tensor] | None
    rescale: bool
    threshold: float
    label_smoothing: float
    sigmoid: bool
    inplace_backward: bool
    class_dim: int

    @staticmethod
    def check(
        penalty, rescale, threshold, label_smoothing, activation, inplace_backward=False, class_dim=-1
    ) -> "Options":
        function = penalty if callable(penalty) else None
        if inplace_backward and function is not None:
            raise ValueError("inplace_backward must be False with a penalty that is a function")
        names = tuple(PENALTIES)
        return Options(
            0 if function else names.index(checks.choice("penalty", penalty, names)),
            function,
            checks.boolean("rescale", rescale),
            checks.number("threshold", threshold, "a number", lambda value: True),
            checks.fraction("label_smoothing", label_smoothing),
            checks.choice("activation", activation, ACTIVATIONS) == "sigmoid",
            checks.boolean("inplace_backward", inplace_backward),
            checks.integer("class_dim", class_dim),
        )
