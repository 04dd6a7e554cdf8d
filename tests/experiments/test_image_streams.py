"""Images that are read as they are trained on: their layouts, their classes, and training by the code of the small sets."""

import shutil

import pytest
import torch

from experiments import frame, image_sets, image_streams, images

from ..integrations import library
from . import folders

QUICK = frame.Options(quick=True, seeds=1)


def colours(x):
    """Which of the made-up classes, in the order of their names, the images of a batch look like."""
    scale = torch.tensor(image_streams.DEVIATION).view(3, 1, 1)
    pixels = 255 * (x * scale + torch.tensor(image_streams.MEAN).view(3, 1, 1)).mean((2, 3))
    known = torch.tensor([folders.COLOURS[name] for name in sorted(folders.COLOURS)]).float()
    gap, which = torch.cdist(pixels, known).min(1)
    assert gap.max() < 6  # JPEG rounds
    return which


def test_folders_are_found_by_their_layout(tmp_path):
    folders.imagenet(tmp_path)
    folders.tiny_imagenet(tmp_path)
    assert list(image_streams.in_folder(tmp_path)) == ["imagenet"]  # the other is read at once
    assert list(image_sets.in_folder(tmp_path)) == ["tiny-imagenet-200"]
    for name, tiny in (("imagenet", False), ("tiny-imagenet-200", True)):
        (found,) = image_streams.in_folder(tmp_path / name).items()
        assert found == (name, tmp_path / name) and image_streams.is_tiny(found[1]) == tiny
    assert image_streams.in_folder(None) == {}
    full = images.cells(frame.Options(full=True, data=tmp_path / "imagenet"))
    assert "imagenet | ResNet-50 | MixupE" in full and not any("imagenet | PreAct" in cell for cell in full)
    tiny = images.cells(frame.Options(full=True, data=tmp_path / "tiny-imagenet-200"))
    assert {f"tiny-imagenet-200 | {network} | ERM" for network in images.LARGE} <= set(tiny)


@pytest.mark.parametrize("make, name", [(folders.imagenet, "imagenet"), (folders.tiny_imagenet, "tiny-imagenet-200")])
def test_images_have_their_classes(tmp_path, make, name):
    library("torchvision")
    stream = image_streams.read(make(tmp_path) / name, QUICK)
    assert (stream.classes, stream.height, stream.alpha) == (3, 32, 0.2)
    for batches in (stream.shown("train"), stream.shown("test"), stream.batches(4, torch.Generator())):
        seen = []
        for x, labels in batches:
            assert x.shape[1:] == (3, 32, 32) and torch.equal(colours(x), labels)
            seen += labels.tolist()
        assert len(seen) in (len(stream.train), len(stream.test)) and set(seen) == {0, 1, 2}
    first, again, other = (
        torch.cat([labels for _, labels in stream.batches(4, torch.Generator().manual_seed(seed))])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sizes_are_the_papers(tmp_path):
    library("torchvision")
    folders.tiny_imagenet(folders.imagenet(tmp_path))
    for name, height in (("imagenet", 224), ("tiny-imagenet-200", 64)):
        stream = image_streams.read(tmp_path / name, frame.Options(full=True))
        assert stream.height == height and stream.workers > 0
        for part in (stream.drawn, stream.train, stream.test):
            assert part[0][0].shape == (3, height, height)


def test_classes_that_train_has_not_are_refused(tmp_path):
    library("torchvision")
    folders.imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet/train/n02")
    with pytest.raises(ValueError, match="the same classes in train and val, got n02 in one"):
        image_streams.read(tmp_path / "imagenet", QUICK)


@pytest.mark.parametrize("method", ["Mixup", "MixupE 1/4, γ = 1/4"])
def test_they_are_trained_as_the_small_ones(tmp_path, monkeypatch, method):
    library("torchvision")

    def tiny(classes):
        layers = [torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.BatchNorm2d(4), torch.nn.Flatten()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(256, classes))

    monkeypatch.setitem(images.IMAGENET, "ResNet-50", images.Training(tiny, (1, 1), 256))
    options = frame.Options(quick=True, seeds=1, data=folders.imagenet(tmp_path))
    rows = images.run(f"imagenet | ResNet-50 | {method}", options)
    assert [row["kind"] for row in rows] == ["end"] + ["deformed"] * len(image_sets.DEFORMATIONS)
    assert all(0 <= row["error"] <= 100 and row["test_loss"] > 0 for row in rows)
    assert rows == images.run(f"imagenet | ResNet-50 | {method}", options)
