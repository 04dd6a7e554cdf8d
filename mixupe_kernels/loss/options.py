"""The options that every form of the loss shares."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import checks
from ..conventions import PENALTIES

ACTIVATIONS = ("softmax", "sigmoid")


class LossParts(NamedTuple):
    """What a loss was made of, as detached 0-d tensors on the device: reading one synchronises, keeping them does not."""

    mix_loss: Tensor
    clean_loss: Tensor
    reg: Tensor
    eta_hat: Tensor


class LossOptions(NamedTuple):
    """The last fields of ``LossArguments``, in their order."""

    penalty: int
    threshold: float
    rescale: bool
    label_smoothing: float
    sigmoid: bool
    clean_weight: float


class Options(NamedTuple):
    """Checked options of the loss. A ``function`` of the caller's takes the place of the penalty in ``of_loss``."""

    of_loss: LossOptions
    function: Callable[[Tensor], Tensor] | None
    inplace_backward: bool
    class_dim: int

    @staticmethod
    def check(
        clean_weight, penalty, rescale, threshold, label_smoothing, activation, inplace_backward=False, class_dim=-1
    ) -> "Options":
        function = penalty if callable(penalty) else None
        if inplace_backward and function is not None:
            raise ValueError("inplace_backward must be False with a penalty that is a function")
        names = tuple(PENALTIES)
        number = 0 if function else names.index(checks.choice("penalty", penalty, names))
        rescale = checks.boolean("rescale", rescale)
        threshold = checks.number("threshold", threshold, "a number", lambda value: True)
        smoothing = checks.fraction("label_smoothing", label_smoothing)
        sigmoid = checks.choice("activation", activation, ACTIVATIONS) == "sigmoid"
        clean_weight = checks.non_negative("clean_weight", clean_weight)
        return Options(
            LossOptions(number, threshold, rescale, smoothing, sigmoid, clean_weight),
            function,
            checks.boolean("inplace_backward", inplace_backward),
            checks.integer("class_dim", class_dim),
        )
