"""The ways to train that the benchmarks compare: each policy's name, its batch, and one step of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mixupe_kernels as mk

# A MixupE step may cost this much of a Mixup step.
TARGET_RATIO = 1.3
INTERVAL = 4


class Policy(NamedTuple):
    """A way to train.

    Attributes:
        label: its name in tables and pictures.
        options: of :class:`mixupe_kernels.MixupE`; for plain mixup and for ERM, None.
        mixes: False for ERM.
        clean_weight: γ of the loss.
        apart: BatchNorm normalises mixed and clean rows apart, by :func:`mixupe_kernels.split_batch_norm`.
        batched: one call of the model for all rows; False is the two calls of the authors' code.
    """

    label: str
    options: dict | None
    mixes: bool = True
    clean_weight: float = 0.0
    apart: bool = False
    batched: bool = True


POLICIES = {
    "erm": Policy("ERM", None, mixes=False),
    "mixup": Policy("Mixup", None),
    "full": Policy("MixupE full", {}),
    "sample": Policy("MixupE sample 1/8", {"clean_fraction": 1 / 8}),
    "split": Policy("MixupE split 1/4", {"clean_fraction": 1 / 4, "split": True}),
    "mixed": Policy("MixupE mixed", {"regularize": "mixed"}),
    "authors": Policy("MixupE, two calls", {}, batched=False),
    # Every row counts once, γ = ρ; BatchNorm, if there is any, normalises the kinds of rows apart.
    "recipe": Policy("MixupE 1/4, γ = 1/4", {"clean_fraction": 1 / 4}, clean_weight=1 / 4, apart=True),
}
# Those that ``bench step`` times beside these.
POLICIES |= {
    "sample 1/4": Policy("MixupE sample 1/4", {"clean_fraction": 1 / 4}),
    "sample 1/16": Policy("MixupE sample 1/16", {"clean_fraction": 1 / 16}),
    "split 1/8": Policy("MixupE split 1/8", {"clean_fraction": 1 / 8, "split": True}),
    "interval": Policy(f"MixupE interval {INTERVAL}", {"interval": INTERVAL}),
}
# Those of the tables on networks without BatchNorm, where one call and two are the same.
TABULAR = ("erm", "mixup", "full", "sample", "split", "mixed")


# What only the benchmarks of quality train: the regularizer without mixing (MixupE, Table 7).
ERM_AND_REGULARIZER = "erm_r"


def regularized_erm(alpha: float) -> Callable[[Tensor, Tensor], tuple[Tensor, mk.MixedTarget]]:
    """(x, labels) → (x, target) of plain samples that carry both the cross-entropy and the regularizer."""
    weight = mk.expected_a_lambda(alpha)

    def batch(x: Tensor, labels: Tensor) -> tuple[Tensor, mk.MixedTarget]:
        rows = len(labels)
        return x, mk.MixedTarget(labels, labels, torch.ones(rows, device=x.device), rows, rows, weight)

    return batch


def make_batch(policy: Policy, alpha: float, generator: torch.Generator | None = None, **options) -> Callable:
    """(x, labels) → (x, target) of a policy; ``options`` go to the mixing class."""
    if not policy.mixes:
        return lambda x, labels: (x, labels)
    if policy.options is None:
        return mk.Mixup(alpha, generator=generator, **options)
    return mk.MixupE(alpha, generator=generator, **policy.options, **options)


def named_batch(name: str, alpha: float, generator: torch.Generator | None = None) -> Callable:
    """(x, labels) → (x, target) of a policy of the table, or of ``ERM_AND_REGULARIZER``."""
    if name == ERM_AND_REGULARIZER:
        return regularized_erm(alpha)
    return make_batch(POLICIES[name], alpha, generator)


def make_step(
    policy: Policy,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    alpha: float,
    eta: float,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """One whole training step of a policy: batch, forward, loss, backward, optimizer; returns the loss.

    The BatchNorm layers of ``model`` are converted if the policy says so.
    """
    batch = make_batch(policy, alpha, generator)
    criterion = mk.MixupELoss(eta, clean_weight=policy.clean_weight)
    if policy.apart:
        mk.split_batch_norm(model)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        x, target = batch(x, labels)
        optimizer.zero_grad(set_to_none=True)
        rows = target if isinstance(target, mk.MixedTarget) else None
        loss = criterion(mk.forward_mixupe(model, x, rows, batched=policy.batched), target)
        loss.backward()
        optimizer.step()
        return loss

    return step
