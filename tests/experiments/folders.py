"""Folders of data in the formats that experiments read, with made-up contents."""

import wave

import numpy as np
import torch


def utterances(folder, speakers=3, each=4):
    """JapaneseVowels' two files with a few utterances of each speaker."""
    generator = np.random.default_rng(0)
    place = folder / "JapaneseVowels"
    place.mkdir(parents=True)
    for part in ("TRAIN", "TEST"):
        lines = ["# made up", "@problemName JapaneseVowels", "@data"]
        for speaker in range(1, speakers + 1):
            for index in range(each):
                series = generator.normal(speaker, 1, (12, 7 + index))
                lines.append(":".join(",".join(f"{value:.4f}" for value in row) for row in series) + f":{speaker}")
        (place / f"JapaneseVowels_{part}.ts").write_text("\n".join(lines) + "\n")
    return folder


def graphs(folder, name="RINGS", count=30):
    """A TU set: rings of 4 to 8 nodes are one class, rings with a chord the other."""
    place = folder / name
    place.mkdir(parents=True)
    edges, graph, kinds, labels, first = [], [], [], [], 1
    for index in range(count):
        size, label = 4 + index % 5, index % 2
        pairs = [(i, (i + 1) % size) for i in range(size)] + [(0, 2)] * label
        edges += [(first + a, first + b) for pair in pairs for a, b in (pair, pair[::-1])]
        graph += [index + 1] * size
        kinds += [i % 3 for i in range(size)]
        labels.append(2 * label - 1)
        first += size
    for ending, lines in (
        ("A", [f"{a}, {b}" for a, b in edges]),
        ("graph_indicator", graph),
        ("node_labels", kinds),
        ("graph_labels", labels),
    ):
        (place / f"{name}_{ending}.txt").write_text("\n".join(map(str, lines)) + "\n")
    return folder


def _pickle(path, key, count, classes):
    """``count`` images of noise as CIFAR's files keep them, the first and the last class among their labels."""
    import pickle

    data = torch.randint(256, (count, 3072), generator=torch.Generator().manual_seed(len(path.name))).to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [index * (classes - 1) // (count - 1) for index in range(count)]
    path.write_bytes(pickle.dumps({"data": data.numpy(), key: labels}))


def cifar10(folder, count=2):
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        _pickle(folder / "cifar-10-batches-py" / name, "labels", count, 10)
    return folder


def cifar100(folder, count=4):
    for name in ("train", "test"):
        _pickle(folder / "cifar-100-python" / name, "fine_labels", count, 100)
    return folder


# The frequency of a made-up command, in Hz.
COMMANDS = {"low": 1000, "high": 3000}


def wav(path, sound, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def commands(folder, each=6):
    """Google's commands with tones for words, half a second of them in each second file; of each word one is for validation, two for the test."""
    place = folder / "speech_commands_v0.01"
    generator, lists = np.random.default_rng(0), {"validation": [], "testing": []}
    for word, frequency in COMMANDS.items():
        for index in range(each):
            time = np.arange(16_000 // (1 + index % 2)) / 16_000
            sound = 0.5 * np.sin(2 * np.pi * frequency * time) + generator.normal(0, 0.01, len(time))
            wav(place / word / f"{index}_nohash_0.wav", sound)
            if index < 3:
                lists["testing" if index else "validation"].append(f"{word}/{index}_nohash_0.wav")
    wav(place / "_background_noise_" / "noise.wav", generator.normal(0, 0.1, 16_000))
    for part, names in lists.items():
        (place / f"{part}_list.txt").write_text("\n".join(names) + "\n")
    return folder


def svhn(folder, count=12):
    """SVHN's two files: image i is of the colour (i, 2 i, 3 i) and of the class i % 10, whose 0 is written as 10."""
    from scipy.io import savemat

    place = folder / "svhn"
    place.mkdir(parents=True)
    index = np.arange(count)
    x = np.broadcast_to(index * np.array([[1], [2], [3]]), (32, 32, 3, count)).astype(np.uint8)
    y = np.where(index % 10, index % 10, 10)[:, None].astype(np.uint8)
    for part in ("train", "test"):
        savemat(place / f"{part}_32x32.mat", {"X": x, "y": y})
    return folder


# The colours of the made-up classes of Tiny-ImageNet and ImageNet, by name.
COLOURS = {"n03": (200, 0, 0), "n01": (0, 200, 0), "n02": (0, 0, 200)}


def picture(path, colour, size=64):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path, "JPEG")


def tiny_imagenet(folder, each=2):
    """Tiny-ImageNet's folders: training images by class, those for validation in one folder with a list of their classes."""
    place = folder / "tiny-imagenet-200"
    lines = []
    for name, colour in COLOURS.items():
        for index in range(each):
            picture(place / "train" / name / "images" / f"{name}_{index}.JPEG", colour)
    for index, (name, colour) in enumerate(COLOURS.items()):
        picture(place / "val/images" / f"val_{index}.JPEG", colour)
        lines.append(f"val_{index}.JPEG\t{name}\t0\t0\t62\t62")
    (place / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    (place / "wnids.txt").write_text("\n".join(COLOURS) + "\n")
    return folder


def imagenet(folder, each=3):
    """ImageNet's folders: training and validation images by class, not square."""
    from PIL import Image

    place = folder / "imagenet"
    for part in ("train", "val"):
        for name, colour in COLOURS.items():
            for index in range(each):
                path = place / part / name / f"{name}_{index}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (60 + index, 48), colour).save(path, "JPEG")
    return folder
