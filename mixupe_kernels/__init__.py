"""Fused operators that make MixupE training (Zou et al., UAI 2023) cost what plain mixup costs.

>>> mixup_fn = mixupe_kernels.MixupE(alpha=1.0, clean_fraction=1 / 8)
>>> criterion = mixupe_kernels.MixupELoss(eta=1e-3)
>>> x, target = mixup_fn(x, labels)
>>> criterion(model(x), target).backward()
"""

from . import pairing, sampling
from .backends import available_backends, use_backend
from .batch import MixedTarget, Mixup, MixupE, mix_labels
from .exact import batch_mean, exact_q
from .forward import forward_mixupe
from .linear import linear_mixupe_loss
from .loss import MixupELoss, mixupe_loss, q_hat
from .manifold import ManifoldMixup
from .metrics import MixedAccuracy, mixed_accuracy
from .ops import bce_entropy, ce_entropy, mix
from .sampling import expected_a_lambda
from .schedule import LinearRamp

__version__ = "0.1.0"

__all__ = [
    "LinearRamp",
    "ManifoldMixup",
    "MixedTarget",
    "Mixup",
    "MixupE",
    "MixupELoss",
    "MixedAccuracy",
    "available_backends",
    "batch_mean",
    "bce_entropy",
    "ce_entropy",
    "exact_q",
    "expected_a_lambda",
    "forward_mixupe",
    "linear_mixupe_loss",
    "mix",
    "mix_labels",
    "mixed_accuracy",
    "mixupe_loss",
    "pairing",
    "q_hat",
    "sampling",
    "use_backend",
]
