"""Mixup without chance: every sample pulled towards the mean, as far as mixup's perturbation pulls it on average."""

import torch
from torch import Tensor

from .. import checks
from ..conventions import check_range
from .sampling import Distribution


class ApproximatedMixup:
    """x̃ = x̄ + θ̄(x − x̄), ỹ = ȳ + θ̄(y − ȳ): the mean of what mixup makes of a sample (Carratino et al., 2022, "On Mixup Regularization").

    Mixup with λ is, in expectation, training on x̃ and ỹ with noise of mean 0 added to both, whose size the variance of θ gives.
    This is that training without the noise: it keeps the pull towards the means and the smoothed labels.

    >>> approximated = mixupe_kernels.ApproximatedMixup(x_train.mean(0), class_shares, mixupe_kernels.sampling.Beta(1.0))
    >>> x, target = approximated(x, labels)
    >>> criterion(model(x), target)

    Predict on ``approximated.inputs(x)``: the network has seen no others.

    Args:
        x_mean: x̄, of the shape of one sample, floating point.
        y_mean: ȳ, (C,), the shares of the classes among the training labels, floating point.
        theta: θ̄ in [0, 1], or a distribution of :mod:`mixupe_kernels.sampling`, whose ``theta_mean`` it is.

    Raises:
        TypeError, ValueError: if an argument is anything else.
    """

    def __init__(self, x_mean: Tensor, y_mean: Tensor, theta: float | Distribution):
        for name, mean in (("x_mean", x_mean), ("y_mean", y_mean)):
            checks.tensor(name, mean)
            checks.dtype(name, mean, checks.LOGITS_DTYPES)
        if y_mean.dim() != 1:
            raise ValueError(f"y_mean must have shape (C,), got {tuple(y_mean.shape)}")
        self.x_mean, self.y_mean = x_mean, y_mean
        self.theta = checks.fraction("theta", theta.theta_mean if isinstance(theta, Distribution) else theta)

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(x̃, ỹ) of a batch: x (N, ...), labels (N,) int64 classes or (N, C) shares; ỹ is (N, C) in ȳ's dtype."""
        x = self.inputs(x)
        checks.tensor("labels", labels)
        if labels.shape[:1] != x.shape[:1]:
            raise ValueError(f"labels must have {x.shape[0]} rows, as x, got {tuple(labels.shape)}")
        return x, self.targets(labels)

    def inputs(self, x: Tensor) -> Tensor:
        """x̃ of x (N, ...), floating point, on the device of x̄ and in the dtype of x."""
        checks.tensor("x", x)
        checks.dtype("x", x, checks.LOGITS_DTYPES)
        checks.shape("x", x, (*x.shape[:1], *self.x_mean.shape))
        checks.same_device("x", x, "x_mean", self.x_mean)
        return torch.lerp(self.x_mean.to(x.dtype), x, self.theta)

    def targets(self, labels: Tensor) -> Tensor:
        """ỹ, (N, C), of classes (N,) int64 in [0, C) or of shares (N, C)."""
        checks.tensor("labels", labels)
        checks.same_device("labels", labels, "y_mean", self.y_mean)
        classes = len(self.y_mean)
        if labels.dim() == 1:
            checks.dtype("labels", labels, (torch.int64,))
            check_range("labels", labels, 0, classes - 1, f"a class in [0, {classes - 1}]")
            labels = torch.nn.functional.one_hot(labels, classes)
        checks.shape("labels", labels, (labels.shape[0] if labels.dim() else 0, classes))
        return torch.lerp(self.y_mean, labels.to(self.y_mean.dtype), self.theta)
