"""``torch.ops.mixupe.*`` and the public functions over them. Importing this declares every operator."""

from .losses import (
    MixupELossWithGradient,
    backward_options,
    ce_entropy_backward_op,
    ce_entropy_op,
    mixupe_loss_backward_out_op,
    mixupe_loss_op,
)
from .mixing import gather_sum_op, mix, mix_op, mix_out_op, mixed_target_op
from .registration import below_autograd, call, in_backward, operators, transforms_active

__all__ = [
    "MixupELossWithGradient",
    "backward_options",
    "below_autograd",
    "call",
    "ce_entropy_backward_op",
    "ce_entropy_op",
    "gather_sum_op",
    "in_backward",
    "mix",
    "mix_op",
    "mix_out_op",
    "mixed_target_op",
    "mixupe_loss_backward_out_op",
    "mixupe_loss_op",
    "operators",
    "transforms_active",
]
