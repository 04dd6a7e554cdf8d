"""Images for the experiment of that name: the small sets of the benchmarks, and CIFAR, SVHN and Tiny-ImageNet from a folder."""

import functools
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import data, image_data

SMALL = tuple(image_data.SETS)


class Images(NamedTuple):
    """x (n, C, H, W) float32, scaled, and labels (n,); ``color`` sets are cropped and flipped in training."""

    x_train: Tensor
    train: Tensor
    x_test: Tensor
    test: Tensor
    classes: int
    color: bool = False
    alpha: float = 1.0

    @property
    def height(self) -> int:
        return self.x_test.shape[2]

    @property
    def order_device(self) -> torch.device:
        """Where the generator of ``batches`` is."""
        return self.train.device

    def to(self, device: torch.device) -> "Images":
        return self._replace(
            **{name: getattr(self, name).to(device) for name in ("x_train", "train", "x_test", "test")}
        )

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch's batches."""
        for rows in data.batches(len(self.train), size, generator):
            x = self.x_train[rows]
            yield augmented(x, generator) if self.color else x, self.train[rows]

    def shown(self, part: str) -> Iterable[tuple[Tensor, Tensor]]:
        """All images of ``train`` or ``test``, some at a time, as they are."""
        x, labels = (self.x_train, self.train) if part == "train" else (self.x_test, self.test)
        return zip(x.split(1000), labels.split(1000), strict=True)


def small(name: str, seed: int) -> Images:
    parts = image_data.SETS[name].split(seed)
    return Images(parts.x_train, parts.train, parts.x_test, parts.test, image_data.CLASSES)


def _pickled(path: Path) -> dict:
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")  # the authors' files are pickles: read those that you trust


def _cifar(folder: Path, train: list[str], test: str, key: str) -> list[Tensor]:
    def read(names: list[str]) -> list[Tensor]:
        batches = [_pickled(folder / name) for name in names]
        x = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        return [torch.from_numpy(x), torch.tensor([label for batch in batches for label in batch[key]])]

    return read(train) + read([test])


def _svhn(folder: Path) -> list[Tensor]:
    from scipy.io import loadmat

    found = []
    for part in ("train", "test"):
        read = loadmat(folder / f"{part}_32x32.mat")
        labels = torch.from_numpy(read["y"].astype(np.int64)).flatten() % 10  # a 0 is said as 10
        found += [torch.from_numpy(read["X"].transpose(3, 2, 0, 1).copy()), labels]
    return found


def _tiny(folder: Path) -> list[Tensor]:
    from PIL import Image

    def pixels(paths: list[Path]) -> Tensor:
        return torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in paths])

    names = (folder / "wnids.txt").read_text().split()
    train = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / "train" / name / "images").iterdir())
    ]
    lines = [line.split("\t")[:2] for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
    test = [(folder / "val/images" / name, names.index(label)) for name, label in lines]
    return [
        value for part in (train, test) for value in (pixels([p for p, _ in part]), torch.tensor([y for _, y in part]))
    ]


# Folder → how it is read: [x_train, train, x_test, test] with x uint8.
FOLDERS = {
    "cifar-10-batches-py": lambda f: _cifar(f, [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels"),
    "cifar-100-python": lambda f: _cifar(f, ["train"], "test", "fine_labels"),
    "svhn": _svhn,
    "tiny-imagenet-200": _tiny,
}


@functools.cache
def from_folder(folder: Path, name: str) -> Images:
    x_train, train, x_test, test = FOLDERS[name](folder / name)
    mean = x_train.float().mean((0, 2, 3), keepdim=True)
    deviation = x_train.float().flatten(2).std((0, 2))[None, :, None, None]
    x_train, x_test = ((x.float() - mean) / deviation for x in (x_train, x_test))
    alpha = 0.2 if name == "tiny-imagenet-200" else 1.0  # MixupE §4.1
    return Images(x_train, train, x_test, test, int(train.max()) + 1, True, alpha)


def in_folder(folder: Path | None) -> list[str]:
    return [name for name in FOLDERS if folder and (folder / name).exists()]


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped with probability 1/2 and cropped from a frame of four reflected pixels."""
    count, channels, height, width = x.shape

    def numbers(end: int) -> Tensor:
        return torch.arange(end, device=x.device)

    flip = torch.rand(count, generator=generator, device=x.device) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    framed = F.pad(x, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(9, (2, count), generator=generator, device=x.device)
    rows = (top[:, None] + numbers(height))[:, None, :, None]
    columns = (left[:, None] + numbers(width))[:, None, None, :]
    return framed[numbers(count)[:, None, None, None], numbers(channels)[None, :, None, None], rows, columns]


# Affine maps of a draw u in [−1, 1], as the four entries of their matrix.


def rotation(degrees: float):
    def matrix(u: Tensor) -> Tensor:
        angle = torch.deg2rad(u * degrees)
        return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)

    return matrix


def shear(degrees: float):
    def matrix(u: Tensor) -> Tensor:
        return torch.stack(
            [torch.ones_like(u), torch.deg2rad(u * degrees).tan(), torch.zeros_like(u), torch.ones_like(u)], 1
        )

    return matrix


def zoom(scale: float):
    return lambda u: u.new_tensor([1 / scale, 0, 0, 1 / scale]).expand(len(u), 4)


# The test images of MixupE, Table 8.
DEFORMATIONS = {
    "rotation ±20°": rotation(20),
    "rotation ±40°": rotation(40),
    "shearing ±28.6°": shear(28.6),
    "shearing ±57.3°": shear(57.3),
    "zoom 60 %": zoom(0.6),
    "zoom 80 %": zoom(0.8),
    "zoom 120 %": zoom(1.2),
    "zoom 140 %": zoom(1.4),
}


def deformed(x: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Images under an affine map drawn for each of them; what comes from outside is the image's edge."""
    u = 2 * torch.rand(len(x), generator=generator, device=x.device) - 1
    matrix = torch.cat([DEFORMATIONS[name](u).view(-1, 2, 2), u.new_zeros(len(x), 2, 1)], 2)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
