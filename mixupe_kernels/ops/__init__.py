"""``torch.ops.mixupe.*`` and the public functions over them. Importing this declares every operator."""

from .arguments import (
    LossArguments,
    LossStats,
    Mixing,
    Parts,
    RowGradients,
    RowOptions,
    RowOutputs,
    RowStats,
    RowTarget,
)
from .double_backward import alias
from .losses import ce_entropy, ce_entropy_backward, fused_loss, is_one, mixupe_loss_backward_out_op
from .mixing import gather_sum_op, mix, mix_op, mix_out_op, mixed_target_op
from .normalising import NormLayer, batch_norm_apart
from .registration import call, in_backward, is_exporting, is_transformed, operators

__all__ = [
    "LossArguments",
    "LossStats",
    "Mixing",
    "NormLayer",
    "Parts",
    "RowGradients",
    "RowOptions",
    "RowOutputs",
    "RowStats",
    "RowTarget",
    "alias",
    "batch_norm_apart",
    "call",
    "ce_entropy",
    "ce_entropy_backward",
    "fused_loss",
    "gather_sum_op",
    "in_backward",
    "is_exporting",
    "is_one",
    "is_transformed",
    "mix",
    "mix_op",
    "mix_out_op",
    "mixed_target_op",
    "mixupe_loss_backward_out_op",
    "operators",
]
