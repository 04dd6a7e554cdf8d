"""The ways to train that the benchmarks compare: each policy's name, its batch, and one step of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mixupe_kernels as mk

# A MixupE step may cost this much of a Mixup step.
TARGET_RATIO = 1.3


class Policy(NamedTuple):
    """``options`` of :class:`mixupe_kernels.MixupE`; for plain mixup and for ERM, None."""

    label: str
    options: dict | None
    mixes: bool = True


POLICIES = {
    "erm": Policy("ERM", None, mixes=False),
    "mixup": Policy("Mixup", None),
    "full": Policy("MixupE full", {}),
    "sample": Policy("MixupE sample 1/8", {"clean_fraction": 1 / 8}),
    "split": Policy("MixupE split 1/4", {"clean_fraction": 1 / 4, "split": True}),
    "mixed": Policy("MixupE mixed", {"regularize": "mixed"}),
}


# What only the benchmarks of quality train: the regularizer without mixing (MixupE, Table 7).
ERM_AND_REGULARIZER = "erm_r"


def regularized_erm(alpha: float) -> Callable[[Tensor, Tensor], tuple[Tensor, mk.MixedTarget]]:
    """(x, labels) → (x, target) of plain samples that carry both the cross-entropy and the regularizer."""
    weight = mk.expected_a_lambda(alpha)

    def batch(x: Tensor, labels: Tensor) -> tuple[Tensor, mk.MixedTarget]:
        rows = len(labels)
        return x, mk.MixedTarget(labels, labels, torch.ones(rows, device=x.device), rows, rows, weight)

    return batch


def make_batch(name: str, alpha: float, generator: torch.Generator | None = None, **options) -> Callable:
    """(x, labels) → (x, target) of a policy; ``options`` go to the mixing class."""
    if name == ERM_AND_REGULARIZER:
        return regularized_erm(alpha)
    policy = POLICIES[name]
    if not policy.mixes:
        return lambda x, labels: (x, labels)
    if policy.options is None:
        return mk.Mixup(alpha, generator=generator, **options)
    return mk.MixupE(alpha, generator=generator, **policy.options, **options)


def make_step(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    alpha: float,
    eta: float,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """One whole training step of a policy: batch, forward, loss, backward, optimizer; returns the loss."""
    batch = make_batch(name, alpha, generator)
    criterion = mk.MixupELoss(eta)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        x, target = batch(x, labels)
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return step
