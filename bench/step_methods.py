"""The ways to train that ``bench step`` times: the batch of a step and its loss, whatever the model and the optimizer."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixupe_kernels as mk

from .methods import POLICIES

ALPHA, ETA = 1.0, 1e-3
BASE = "Mixup eager"
# Policies of MixupE, in the order of the table.
STEPPED = ("full", "sample 1/4", "sample", "sample 1/16", "split", "split 1/8", "mixed", "interval")


class Method(NamedTuple):
    """(x, labels) → what ``objective`` takes, outside of torch.compile; ``objective`` gives the loss.

    ``extra_rows`` are the model's rows beyond the batch, as a share of it; None where 1 + ρu does not apply. A call of the
    contender makes ``steps`` steps.
    """

    prepare: Callable[[Tensor, Tensor], tuple]
    objective: Callable[..., Tensor]
    extra_rows: float | None
    steps: int = 1


def soft_target_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy with dense targets, as timm's ``SoftTargetCrossEntropy`` has it."""
    return (-target * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def eager_mixup(model: nn.Module, classes: int) -> Method:
    """timm's batch mode: λ on the host, x mixed in place with its reverse, one-hot targets mixed."""

    def prepare(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        lam = random.betavariate(ALPHA, ALPHA)
        flipped = x.flip(0).mul_(1 - lam)
        x.mul_(lam).add_(flipped)
        own = F.one_hot(labels, classes).float()
        return x, own * lam + own.flip(0) * (1 - lam)

    return Method(prepare, lambda x, target: soft_target_cross_entropy(model(x), target), 0.0)


def authors_loss(mixed: Tensor, clean: Tensor, labels: Tensor, partner: Tensor, lam: float, weight: float) -> Tensor:
    """MixupE, eq. 5 and 7-9, in eager PyTorch on the outputs of two calls, with a one-hot target."""
    mixed, clean = mixed.float(), clean.float()
    mix_loss = lam * F.cross_entropy(mixed, labels) + (1 - lam) * F.cross_entropy(mixed, labels[partner])
    q = ((F.one_hot(labels, clean.shape[1]) - clean.softmax(1)) * clean).sum(1)
    total = mix_loss + ETA * weight * q.abs().mean()
    return (mix_loss.abs() / total.abs()).detach() * total


def authors(model: nn.Module, classes: int) -> Method:
    """MixupE as its authors run it: a call for the mixed rows, another for the clean ones."""
    weight = mk.expected_a_lambda(ALPHA)

    def prepare(x: Tensor, labels: Tensor) -> tuple:
        lam = random.betavariate(ALPHA, ALPHA)
        partner = torch.randperm(len(x), device=x.device)
        return lam * x + (1 - lam) * x[partner], x, labels, partner, lam

    def objective(mixed: Tensor, x: Tensor, labels: Tensor, partner: Tensor, lam: float) -> Tensor:
        return authors_loss(model(mixed), model(x), labels, partner, lam, weight)

    return Method(prepare, objective, 1.0)


def ours(model: nn.Module, mixer: mk.Mixup, extra_rows: float, steps: int = 1) -> Method:
    """A batch of ``mixer`` and the fused loss."""
    criterion = mk.MixupELoss(ETA)
    return Method(mixer, lambda x, target: criterion(model(x), target), extra_rows, steps)


def exact(model: nn.Module, mean: Tensor) -> Method:
    """The regularizer without its approximation: a forward-mode derivative at the clean rows (eq. 4)."""
    mixer, criterion, weight = mk.Mixup(ALPHA, pairing="flip"), mk.MixupELoss(ETA), mk.expected_a_lambda(ALPHA)

    def prepare(x: Tensor, labels: Tensor) -> tuple:
        mixed, target = mixer(x, labels)
        return mixed, target._replace(reg_weight=weight), x, labels

    def objective(mixed: Tensor, target: mk.MixedTarget, x: Tensor, labels: Tensor) -> Tensor:
        return criterion(model(mixed), target, q=mk.exact_q(model, x, labels, mean))

    return Method(prepare, objective, None)


def make_methods(model: nn.Module, classes: int, batch: int, mean: Tensor) -> dict[str, Method]:
    """Every way to train, by the name it has in the results; ours pair as eager Mixup does, and mix in place if they can."""

    methods = {
        BASE: eager_mixup(model, classes),
        "Mixup": ours(model, mk.Mixup(ALPHA, pairing="flip", inplace=True), 0.0),
        "MixupE, authors' form": authors(model, classes),
    }
    for name in STEPPED:
        policy = POLICIES[name]
        mixer = mk.MixupE(ALPHA, pairing="flip", inplace=name == "mixed", **policy.options)
        if mixer.interval > 1:
            methods[policy.label] = ours(model, mixer, 1 / mixer.interval, steps=mixer.interval)
        else:
            rows = 0.0 if mixer.split or mixer.regularize == "mixed" else mixer.num_clean(batch) / batch
            methods[policy.label] = ours(model, mixer, rows)
    methods["MixupE exact q"] = exact(model, mean)
    return methods
