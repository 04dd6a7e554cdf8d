"""Many small networks trained as one: the seeds are slices of batched matrices, and each draws its own batches.

A seed fixes the split, the initialisation, the order of the rows, λ and partners, so that two methods are paired by seed.
Mixing and losses run for all seeds at once, on the rows of all of them: partners stay within a seed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mixupe_kernels as mk

from . import frame

BATCH, LEARNING_RATE = 100, 1e-3


class Networks:
    """E multilayer perceptrons with ReLU, initialised as ``torch.nn.Linear`` is under each seed: (E, N, d) → (E, N, C).

    They begin alike on every ``device``.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sizes: Sequence[int],
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        layers = []
        for seed in seeds:
            torch.manual_seed(seed)
            layers.append([torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])
        self.dropout, self.training = dropout, True
        self.parameters = []
        for copies in zip(*layers, strict=True):
            weights = torch.stack([layer.weight.detach().t() for layer in copies])
            biases = torch.stack([layer.bias.detach()[None] for layer in copies])
            self.parameters += [part.to(device).requires_grad_() for part in (weights, biases)]

    @property
    def depth(self) -> int:
        return len(self.parameters) // 2

    def layer(self, index: int, x: Tensor, parameters: Sequence[Tensor] | None = None) -> Tensor:
        """One linear layer, after ReLU and dropout unless it is the first."""
        weight, bias = (parameters or self.parameters)[2 * index : 2 * index + 2]
        if index:
            x = F.dropout(x.relu(), self.dropout, self.training)
        return torch.baddbmm(bias, x, weight)

    def __call__(self, x: Tensor, first: int = 0, last: int | None = None, parameters=None) -> Tensor:
        """Layers ``first`` to ``last`` (of all ``depth``)."""
        for index in range(first, self.depth if last is None else last):
            x = self.layer(index, x, parameters)
        return x


class Rows(NamedTuple):
    """Targets of (E, N) rows: two labels and the weight of the first."""

    labels: Tensor
    partner_labels: Tensor
    lam: Tensor


def cross_entropy(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """(ce, entropy) of every row, (E, N) each, by :func:`mixupe_kernels.ce_entropy`."""
    flat = [part.flatten() for part in rows]
    ce, entropy, _ = mk.ce_entropy(logits.flatten(0, 1), mk.MixedTarget(*flat, len(flat[2]), 0, 0.0))
    return ce.view(logits.shape[:2]), entropy.view(logits.shape[:2])


def plain(labels: Tensor) -> Rows:
    return Rows(labels, labels, torch.ones(labels.shape, device=labels.device))


class Draws:
    """One generator a seed, all on ``device``: λ and partners of E batches."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generators = [frame.generator(seed, device) for seed in seeds]

    def _each(self, draw: Callable[..., Tensor], *arguments) -> Tensor:
        return torch.stack([draw(*arguments, generator=g, device=self.device) for g in self.generators])

    def partners(self, rows: int) -> Tensor:
        return self._each(torch.randperm, rows)

    def lam(self, law: mk.sampling.Distribution, shape: tuple[int, ...] = ()) -> Tensor:
        """(E, *shape): one λ a seed, unless a shape is given."""
        return self._each(law.sample, shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._each(torch.rand, shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._each(torch.randn, shape)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (E, M) of values (E, N, ...)."""
    return values[torch.arange(len(index), device=index.device).unsqueeze(1), index]


def mix(x: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """λx + (1 − λ)x[partner] within each seed: x (E, N, ...), partner and λ (E, N)."""
    seeds, rows = partner.shape
    offset = torch.arange(seeds, device=partner.device).unsqueeze(1) * rows
    return mk.mix(x.flatten(0, 1).contiguous(), (partner + offset).flatten(), lam.flatten()).view(x.shape)


def mixed(x: Tensor, labels: Tensor, law: mk.sampling.Distribution, draws: Draws) -> tuple[Tensor, Rows]:
    """Plain mixup of each seed's batch, one λ a batch."""
    partner = draws.partners(labels.shape[1])
    lam = draws.lam(law)[:, None].expand(labels.shape)
    return mix(x, partner, lam), Rows(labels, labels.gather(1, partner), lam)


# (network, x, labels, draws) → the loss of each seed, (E,)
Objective = Callable[[Networks, Tensor, Tensor, Draws], Tensor]


def erm(network: Networks, x: Tensor, labels: Tensor, draws: Draws) -> Tensor:
    return cross_entropy(network(x), plain(labels))[0].mean(1)


def mixup(alpha: float) -> Objective:
    law = mk.sampling.Beta(alpha)

    def objective(network, x, labels, draws):
        x, rows = mixed(x, labels, law, draws)
        return cross_entropy(network(x), rows)[0].mean(1)

    return objective


def mixupe(alpha: float, eta: float, gamma: float = 0.0, mixes: bool = True) -> Objective:
    """MixupE on the whole batch (mixed rows, then clean ones); without mixing it is the paper's ERM + R."""
    law, weight = mk.sampling.Beta(alpha), mk.expected_a_lambda(alpha)

    def objective(network, x, labels, draws):
        mixed_x, rows = mixed(x, labels, law, draws) if mixes else (x, plain(labels))
        both = Rows(*(torch.cat(parts, 1) for parts in zip(rows, plain(labels), strict=True)))
        ce, entropy = cross_entropy(network(torch.cat([mixed_x, x], 1)), both)
        half = labels.shape[1]
        first = ce[:, :half].mean(1) + gamma * ce[:, half:].mean(1)
        total = first + eta * weight * (entropy - ce)[:, half:].abs().mean(1)
        return (first / total).detach() * total

    return objective


def train(
    network: Networks,
    x: Tensor,
    labels: Tensor,
    objective: Objective,
    epochs: int,
    batch: int = BATCH,
    rate: float = LEARNING_RATE,
    weight_decay: float = 0.0,
) -> Iterator[Networks]:
    """Adam on (E, n, d) rows, on their device; yields the networks, in evaluation, after each epoch."""
    seeds = range(len(labels))
    draws, order = Draws(seeds, x.device), Draws(seeds, x.device)
    optimizer = torch.optim.Adam(network.parameters, rate, weight_decay=weight_decay, fused=True)
    for _ in range(epochs):
        network.training = True
        for rows in order.partners(labels.shape[1]).split(batch, 1):
            optimizer.zero_grad(set_to_none=True)
            objective(network, gather(x, rows), labels.gather(1, rows), draws).sum().backward()
            optimizer.step()
        network.training = False
        yield network


def trained(network: Networks, x: Tensor, labels: Tensor, objective: Objective, epochs: int, **options) -> Networks:
    for _ in train(network, x, labels, objective, epochs, **options):
        pass
    return network


@torch.no_grad()
def errors(network: Networks, x: Tensor, labels: Tensor) -> Tensor:
    """Test error of each seed in percent, (E,)."""
    return 100 * (network(x).argmax(2) != labels).float().mean(1)


@torch.no_grad()
def losses(network: Networks, x: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each seed, (E,)."""
    return cross_entropy(network(x), plain(labels))[0].mean(1)
