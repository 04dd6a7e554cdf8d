"""Many tabular networks trained as one: every seed and grid point of a policy is a slice of batched matrices.

Each member has its own data split, initialisation, order, λ, partners, α and η, and draws its batches with
:class:`mixupe_kernels.MixupE` as a single run would; only the network and the loss run for all members together. Adam
works element by element, so members do not touch each other.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import mixupe_kernels as mk
from bench import models
from bench.methods import named_batch

from . import data, frame

BATCH, LEARNING_RATE = 100, 1e-3


class Member(NamedTuple):
    """One network: the seed of its split, initialisation and draws, and its grid point."""

    seed: int
    alpha: float
    eta: float


class Network:
    """E copies of the network of §4.2, each initialised as ``models.mlp`` is under its seed: (E, N, d) → (E, N, C)."""

    def __init__(
        self,
        members: Sequence[Member],
        features: int,
        classes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        layers = []
        for member in members:
            torch.manual_seed(member.seed)
            layers.append([layer for layer in models.mlp(features, classes) if isinstance(layer, torch.nn.Linear)])
        self.weights, self.biases = [], []
        for copies in zip(*layers, strict=True):
            weight = torch.stack([layer.weight.detach().t() for layer in copies])
            bias = torch.stack([layer.bias.detach().unsqueeze(0) for layer in copies])
            self.weights.append(weight.to(device, dtype).requires_grad_())
            self.biases.append(bias.to(device, dtype).requires_grad_())

    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, x: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if index else x, weight)
        return x


def member_losses(logits: Tensor, targets: Sequence[mk.MixedTarget], eta: Tensor) -> Tensor:
    """MixupE's loss of each member, (E,), from (E, N, C) logits: the mean of ``mixupe_loss`` taken a member at a time.

    η̂ belongs to a member, so the loss of all rows at once would be another one.
    """
    rows = [torch.cat(parts) for parts in zip(*(target[:3] for target in targets), strict=True)]
    first = targets[0]
    ce, entropy, _ = mk.ce_entropy(logits.flatten(0, 1), mk.MixedTarget(*rows, len(rows[2]), 0, 0.0))
    ce, gap = ce.view(logits.shape[:2]), (entropy - ce).view(logits.shape[:2])
    mix_loss = ce[:, : first.num_mixed].mean(1)
    if not first.num_reg:
        return mix_loss
    weights = [target.reg_weight for target in targets]
    weight = torch.stack([w.to(ce.dtype) if isinstance(w, Tensor) else ce.new_full((), w) for w in weights])
    total = mix_loss + eta * weight * gap[:, -first.num_reg :].abs().mean(1)
    return (mix_loss / total).detach() * total


def _erm_target(labels: Tensor) -> mk.MixedTarget:
    return mk.MixedTarget(labels, labels, torch.ones(labels.shape, device=labels.device), len(labels), 0, 0.0)


def train(
    policy: str,
    members: Sequence[Member],
    splits: dict[int, data.Split],
    classes: int,
    epochs: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Network]:
    """Train all members, on the device of ``splits``, which are by seed and of equal sizes; yields the network after each epoch."""
    first = splits[members[0].seed]
    device = first.train.device
    network = Network(members, first.x_train.shape[1], classes, dtype, device)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    eta = torch.tensor([member.eta for member in members], dtype=dtype, device=device)
    mixers = [named_batch(policy, m.alpha, frame.generator(m.seed, device)) for m in members]
    orders = {seed: frame.generator(seed, device) for seed in splits}
    inputs = {seed: part.x_train.to(dtype) for seed, part in splits.items()}
    for _ in range(epochs):
        order = {seed: data.batches(len(first.train), BATCH, generator) for seed, generator in orders.items()}
        for index in range(len(order[members[0].seed])):
            optimizer.zero_grad(set_to_none=True)
            xs, targets = [], []
            for member, mixer in zip(members, mixers, strict=True):
                rows = order[member.seed][index]
                x, target = mixer(inputs[member.seed][rows], splits[member.seed].train[rows])
                xs.append(x)
                targets.append(target if isinstance(target, mk.MixedTarget) else _erm_target(target))
            member_losses(network(torch.stack(xs)), targets, eta).sum().backward()
            optimizer.step()
        yield network


def errors(network: Network, x: Tensor, labels: Tensor) -> Tensor:
    """Error of each member in percent, (E,), on inputs (E, n, d) and labels (E, n)."""
    with torch.no_grad():
        return 100 * (network(x).argmax(2) != labels).float().mean(1)


def fgsm_errors(network: Network, x: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """Error of each member, (E,), on inputs moved by ``step`` (E, 1, d) along the gradient's sign (mixup, §3.5)."""
    x = x.detach().requires_grad_()
    logits = network(x)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return errors(network, x.detach() + step * gradient.sign(), labels)
