"""Whom each sample of a batch is mixed with: a partner in [0, B) for each of B rows.

A pairing is a function ``pairing(size, generator, device, labels=None, ids=None)`` that returns (size,) int64 on
``device``, drawn from ``generator`` without synchronising. ``labels`` are the batch's, (size,) int64 or (size, C) soft
(whose class is the largest), or label maps (size, ...) int64, which have no one class; ``ids`` are the samples' numbers in the data set, (size,) int64, where the caller gave them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..conventions import check_range, moved, sequence, wide_dtype
from .randomness import Stream, from_stream
from .sampling import rand


def random(size, generator, device, labels=None, ids=None) -> Tensor:
    """A uniformly random permutation (mixup, Zhang et al., 2018); a sample may meet itself."""
    if generator is None:
        return torch.randperm(size, device=device)
    if isinstance(generator, Stream):
        return from_stream(generator.ticket, generator.key, "randperm", [size], torch.int64, device)
    return torch.randperm(size, device=device, generator=generator)


def flip(size, generator, device, labels=None, ids=None) -> Tensor:
    """partner(i) = size - 1 - i, as timm's ``Mixup``."""
    return torch.arange(size - 1, -1, -1, device=device)


def roll(size, generator, device, labels=None, ids=None) -> Tensor:
    """partner(i) = i - 1 modulo size, as torchvision's ``v2.MixUp``, which rolls the batch by one."""
    return sequence(size, device).roll(1)


def derangement(size, generator, device, labels=None, ids=None) -> Tensor:
    """A random permutation without fixed points: one cycle through all rows, uniform over such cycles.

    Each other row is a partner with the same probability. A batch of one row is its own partner.
    """
    order = random(size, generator, device)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def classes(labels: Tensor | None, size: int) -> Tensor:
    """The class of each sample; ValueError if there are no labels, or they are maps of classes."""
    if labels is None:
        raise ValueError(f"labels must be given to pair {size} samples by class, got None")
    if labels.dim() > (2 if labels.is_floating_point() else 1):
        raise ValueError(f"labels must be (B,) classes or (B, C) soft to pair by class, got {tuple(labels.shape)}")
    return labels.argmax(1) if labels.dim() > 1 else labels


def same_class(size, generator, device, labels=None, ids=None) -> Tensor:
    """A permutation, uniformly random within each class."""
    own = classes(labels, size)
    shuffled = random(size, generator, device)
    # Both orders list the classes in the same order, the second with each class shuffled.
    order = own.argsort(stable=True)
    other = shuffled[own[shuffled].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, other)


def different_class(size, generator, device, labels=None, ids=None) -> Tensor:
    """For each sample, uniformly one of those of another class, not one-to-one; itself where there is no other class."""
    ascending, order = classes(labels, size).sort(stable=True)
    first = torch.searchsorted(ascending, ascending)
    last = torch.searchsorted(ascending, ascending, right=True)
    others = size - (last - first)
    uniform = rand((size,), generator, device, wide_dtype(device))
    # The rows of other classes are the `others` that follow the class's own, cyclically.
    chosen = (last + (uniform * others).long()) % max(size, 1)
    chosen = torch.where(others > 0, chosen, sequence(size, device))
    return torch.empty_like(order).scatter_(0, order, order[chosen])


class Neighbors:
    """For each sample, one of its nearest neighbours that are in the batch, uniformly (mixup, Zhang et al., 2018, §3.8).

    Args:
        index: (M, k) int64 in [0, M): the numbers of each sample's nearest neighbours in a data set of M samples, without
            itself.

    Raises:
        TypeError, ValueError: for another dtype, shape or value.

    The batch is given with its samples' numbers, ``mixup_fn(x, labels, ids=ids)``; without them M must be the size of
    the batch, and index is about its rows. A sample none of whose neighbours are in the batch is its own partner.
    """

    def __init__(self, index: Tensor):
        checks.tensor("index", index)
        checks.dtype("index", index, (torch.int64,))
        if index.dim() != 2 or 0 in index.shape:
            raise ValueError(f"index must have shape (M, k), both >= 1, got {tuple(index.shape)}")
        lowest, highest = (int(bound) for bound in index.aminmax())
        if lowest < 0 or highest >= index.shape[0]:
            raise ValueError(f"index must be in [0, {index.shape[0] - 1}], got values from {lowest} to {highest}")
        self.index = index

    def __call__(self, size, generator, device, labels=None, ids=None) -> Tensor:
        self.index = moved("index", self.index, device, torch.int64)
        total = self.index.shape[0]
        rows = sequence(size, device)
        if ids is None:
            if size != total:
                raise ValueError(f"ids must be given where the batch ({size}) is not the indexed data set ({total})")
            ids = rows
        if not torch.compiler.is_compiling():
            check_range("ids", ids, 0, total - 1, f"in [0, {total - 1}]")
        row_of = torch.full((total,), -1, device=device).scatter_(0, ids, rows)
        candidates = row_of[self.index[ids]]
        score = rand(candidates.shape, generator, device)
        best, position = score.masked_fill_(candidates < 0, -1).max(1)
        return torch.where(best < 0, rows, candidates.gather(1, position.unsqueeze(1)).squeeze(1))


PAIRINGS: dict[str, Callable[..., Tensor]] = {
    "random": random,
    "flip": flip,
    "roll": roll,
    "derangement": derangement,
    "same_class": same_class,
    "different_class": different_class,
}


def across_ranks(size, generator, device, labels=None, ids=None) -> Tensor:
    """The rows that other ranks sent, which follow the own: partner(i) = size + i. For mixers, which exchange them."""
    return sequence(2 * size, device)[size:]


def check(partner: Any, size: int, device: torch.device) -> Tensor:
    """What a caller's pairing returned, if it is (size,) int64 in [0, size) on ``device``.

    Raises:
        TypeError, ValueError: if it is anything else.
    """
    name = "pairing(size, generator, device)"
    checks.tensor(name, partner)
    checks.dtype(name, partner, (torch.int64,))
    checks.shape(name, partner, (size,))
    if partner.device != device:
        raise ValueError(f"{name} must be on {device}, got {partner.device}")
    if not torch.compiler.is_compiling():
        check_range(name, partner, 0, size - 1, f"in [0, {size - 1}]")
    return partner


def as_pairing(value: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The pairing of that name, or ``value`` itself if it is callable; ValueError otherwise."""
    names = {**PAIRINGS, "across_ranks": across_ranks}
    return value if callable(value) else names[checks.choice("pairing", value, tuple(names))]


def mirrored(size: int, *drawn: Tensor | None) -> tuple[Any, ...]:
    """What was drawn for the first half of a batch, for the second as well: a row and its partner by :func:`flip` share it."""
    return tuple(None if values is None else torch.cat([values, values.flip(0)[size % 2 :]]) for values in drawn)
