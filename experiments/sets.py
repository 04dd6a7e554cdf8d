"""Tabular sets for the experiments: every seed's split, stacked, so that all seeds are trained as one."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import batched, data
from .frame import Options


class Stacked(NamedTuple):
    """The splits of E seeds: features (E, n, d) and labels (E, n) of each part. ``wrong`` marks training labels that noise gave."""

    x_train: Tensor
    train: Tensor
    x_validation: Tensor
    validation: Tensor
    x_test: Tensor
    test: Tensor
    classes: int
    wrong: Tensor


def digits_table(options: Options) -> data.Table:
    """optdigits if the folder of ``--data`` has it, else scikit-learn's digits, which are its test part (1797 of 5620)."""
    path = options.data and options.data / "optdigits.arff"
    return data.read_arff(path) if path and path.exists() and not options.quick else data.bundled("digits")


def stacked(table: data.Table, options: Options, rows: int | None = None, corrupted: float = 0.0) -> Stacked:
    """``rows`` keeps that many training rows of each seed; ``corrupted`` is the share of training labels drawn at random.

    All is made on the CPU, alike for every device, and moved to that of ``options``.
    """
    if options.quick:
        rows = min(rows or 200, 200)
    splits = []
    for seed in range(options.seeds):
        parts = data.split(table, seed)
        splits.append(parts._replace(x_train=parts.x_train[:rows], train=parts.train[:rows]))
    clean = torch.stack([parts.train for parts in splits])
    noisy = [data.corrupt(labels, corrupted, table.num_classes, seed) for seed, labels in enumerate(clean)]
    parts = [torch.stack(part) for part in zip(*splits, strict=True)]
    parts[1] = torch.stack(noisy)
    wrong = parts[1] != clean
    return Stacked(*(part.to(options.device) for part in parts), table.num_classes, wrong.to(options.device))


def networks(
    parts: Stacked, hidden: tuple[int, ...] = (128, 128), dropout: float = 0.0, first_seed: int = 0
) -> batched.Networks:
    """A network for each seed's rows, where they are."""
    seeds = range(first_seed, first_seed + len(parts.train))
    return batched.Networks(seeds, (parts.x_train.shape[2], *hidden, parts.classes), dropout, parts.train.device)
