"""The operators in Triton, for CUDA tensors (for CPU tensors under TRITON_INTERPRET=1): ``KERNELS`` by operator name.

Each is the function of its name in ``mixupe_kernels.ops.reference``, taking flat arguments as the dispatcher does. Values out of range are not
read: they make their row NaN, where the reference raises. A device-side assert would need ``debug=True``.
"""

from collections.abc import Callable

from .. import reference
from ..arguments import Signature
from . import backward, forward, mix, sums

_FUNCTIONS: dict[str, Callable] = {
    "mix": mix.mix,
    "mix_out": mix.mix_out,
    "mixed_target": mix.mixed_target,
    "gather_sum": sums.gather_sum,
    "row_dot": sums.row_dot,
    "ce_entropy": forward.ce_entropy,
    "ce_entropy_backward": backward.ce_entropy_backward,
    "mixupe_loss": forward.mixupe_loss,
    "mixupe_loss_with_gradient": reference.with_gradient(forward.mixupe_loss, backward.mixupe_loss_backward),
    "mixupe_loss_backward": backward.mixupe_loss_backward,
    "mixupe_loss_backward_out": backward.mixupe_loss_backward_out,
}

KERNELS: dict[str, Callable] = {
    name: Signature(getattr(reference, name)).taking_flat(function) for name, function in _FUNCTIONS.items()
}
