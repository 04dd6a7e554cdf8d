"""Fused operators that make MixupE training (Zou et al., UAI 2023) cost what plain mixup costs.

>>> mixup_fn = mixupe_kernels.MixupE(alpha=1.0, clean_fraction=1 / 4)
>>> criterion = mixupe_kernels.MixupELoss(eta=1e-3, clean_weight=1 / 4)
>>> model = mixupe_kernels.split_batch_norm(model)
>>> x, target = mixup_fn(x, labels)
>>> criterion(mixupe_kernels.forward_mixupe(model, x, target), target).backward()
"""

from .batch import pairing, sampling
from .batch.approximated import ApproximatedMixup
from .batch.batch_norm import forward_mixupe, split_batch_norm
from .batch.collate import Collate
from .batch.labels import mix_labels
from .batch.manifold import ManifoldMixup
from .batch.mixup import Mixup
from .batch.mixupe import MixupE
from .batch.sampling import expected_a_lambda
from .batch.schedule import LinearRamp
from .integrations.like_timm import like_timm
from .loss.accuracy import MixedAccuracy, clean_rows, mixed_accuracy
from .loss.criterion import MixupELoss, mixupe_loss
from .loss.exact import exact_q, input_mean
from .loss.linear import linear_mixupe_loss
from .loss.ranks import ClassShards, StepRows
from .loss.terms import bce_entropy, ce_entropy, q_hat
from .ops import mix
from .ops.backends import available_backends, use_backend
from .target import MixedTarget

batch_mean = input_mean  # the name until 0.1

__version__ = "0.2.0"

__all__ = [
    "ClassShards",
    "Collate",
    "ApproximatedMixup",
    "LinearRamp",
    "ManifoldMixup",
    "MixedTarget",
    "Mixup",
    "MixupE",
    "MixupELoss",
    "MixedAccuracy",
    "StepRows",
    "available_backends",
    "batch_mean",
    "bce_entropy",
    "ce_entropy",
    "clean_rows",
    "exact_q",
    "expected_a_lambda",
    "forward_mixupe",
    "input_mean",
    "like_timm",
    "linear_mixupe_loss",
    "mix",
    "mix_labels",
    "mixed_accuracy",
    "mixupe_loss",
    "pairing",
    "q_hat",
    "sampling",
    "split_batch_norm",
    "use_backend",
]
