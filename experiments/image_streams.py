"""Images that are read from their files while they are trained on, through torchvision: ImageNet's folders and Tiny-ImageNet's."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import frame, image_sets

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
ANNOTATIONS = "val/val_annotations.txt"
JUDGED = 250  # images at a time


class Stream(NamedTuple):
    """Data sets of (image (3, height, height) float32, label): training ones drawn and as they are, and the test's.

    It has what ``image_sets.Images`` has of ``batches``, ``shown``, ``height``, ``classes``, ``alpha`` and ``order_device``. Images are
    read on the CPU and given on ``device``.
    """

    drawn: Dataset
    train: Dataset
    test: Dataset
    classes: int
    height: int
    workers: int
    device: torch.device
    alpha: float = 0.2  # MixupE §4.1, for both sets
    order_device = torch.device("cpu")

    def batches(self, size: int, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        """One epoch's batches; workers are seeded from ``generator`` too."""
        return self._loaded(self.drawn, size, shuffle=True, generator=generator)

    def shown(self, part: str) -> Iterable[tuple[Tensor, Tensor]]:
        return self._loaded({"train": self.train, "test": self.test}[part], JUDGED)

    def _loaded(self, images: Dataset, size: int, **order) -> Iterable[tuple[Tensor, Tensor]]:
        pinned = self.device.type == "cuda"
        for pair in DataLoader(images, size, num_workers=self.workers, pin_memory=pinned, **order):
            x, labels = (part.to(self.device, non_blocking=True) for part in pair)
            yield x, labels


def is_tiny(folder: Path) -> bool:
    return (folder / ANNOTATIONS).exists()


def in_folder(folder: Path | None) -> dict[str, Path]:
    """The sets by name: the folder, if it has train and val, and those in it that image_sets does not read at once."""
    if not folder:
        return {}
    folder = folder.resolve()
    found = (folder, *(path for path in sorted(folder.iterdir()) if path.name not in image_sets.FOLDERS))
    return {path.name: path for path in found if (path / "train").is_dir() and (path / "val").is_dir()}


def read(folder: Path, options: frame.Options) -> Stream:
    """train/CLASS/*.JPEG and val/CLASS/*.JPEG, or val/images/*.JPEG with the classes in val_annotations.txt.

    Training images are cropped at random, resized and flipped; test images are cropped at their centre.

    Raises:
        ValueError: if val has other classes than train, which would number them otherwise.
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    height = options.pick(32, 64 if is_tiny(folder) else 224)
    scaled = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    crop = transforms.Compose([transforms.RandomResizedCrop(height), transforms.RandomHorizontalFlip(), *scaled])
    centre = transforms.Compose([transforms.Resize(height * 8 // 7), transforms.CenterCrop(height), *scaled])
    drawn, train = (ImageFolder(folder / "train", how) for how in (crop, centre))
    test = ImageFolder(folder / "val", centre)
    if is_tiny(folder):
        lines = (line.split("\t") for line in (folder / ANNOTATIONS).read_text().splitlines())
        label = {name: train.class_to_idx[said] for name, said, *_ in lines}
        test.samples = [(path, label[Path(path).name]) for path, _ in test.samples]
    elif test.classes != train.classes:
        odd = sorted(set(test.classes) ^ set(train.classes))
        raise ValueError(f"{folder}: expected the same classes in train and val, got {', '.join(odd)} in one of them")
    workers = 0 if options.quick else len(os.sched_getaffinity(0))
    return Stream(drawn, train, test, len(train.classes), height, workers, options.device)
