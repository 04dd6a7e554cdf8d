"""What a classifier's logits are worth on held-out rows: error, NLL, calibration, and NLL at the best temperature."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

import mixupe_kernels as mk

BINS = 15
# 1/T lies between these, also where all rows are right and NLL falls without end.
SHARPEST, FLATTEST = 1e2, 1e-2


class Figures(NamedTuple):
    """error and ece in percent; ``scaled_nll`` is the NLL of logits / T; ``q_hat`` the mean of |q̂|."""

    error: float
    nll: float
    ece: float
    scaled_nll: float
    q_hat: float


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """ECE in percent, by torchmetrics: 15 bins of equal width, weighted by their rows (Guo et al., 2017)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = logits.shape[1]
    return 100 * multiclass_calibration_error(logits.softmax(1), labels, classes, n_bins=BINS, norm="l1").item()


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T whose logits / T have the least NLL: NLL is convex in 1/T, so its slope there is bisected."""
    logits = logits.double()
    right = logits.gather(1, labels[:, None]).mean()
    low, high = FLATTEST, SHARPEST
    for _ in range(60):
        inverse = (low * high) ** 0.5
        slope = ((logits * inverse).softmax(1) * logits).sum(1).mean() - right
        low, high = (low, inverse) if slope > 0 else (inverse, high)
    return 1 / (low * high) ** 0.5


def figures(logits: Tensor, labels: Tensor, scale: float) -> Figures:
    """Of (n, C) logits; ``scale`` is T, fitted on other rows."""
    return Figures(
        100 * (logits.argmax(1) != labels).float().mean().item(),
        F.cross_entropy(logits, labels).item(),
        expected_calibration_error(logits, labels),
        F.cross_entropy(logits / scale, labels).item(),
        mk.q_hat(logits, labels).abs().mean().item(),
    )
