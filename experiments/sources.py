"""Utterances and graphs: read from a folder of real sets, or from wheels that carry them, which are found and not imported."""

import functools
import wave
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RATE, WINDOW, STEP = 16_000, 320, 160  # mixup, §3.3: a second of sound becomes 160 frequencies at 101 times
BINS, FRAMES = 160, 101


def in_wheel(wheel: str, place: str, what: str) -> Path:
    """A folder of an installed wheel."""
    found = find_spec(wheel)
    for root in found.submodule_search_locations or () if found else ():
        if (Path(root) / place).exists():
            return Path(root) / place
    raise ModuleNotFoundError(f"{what} is in the wheel {wheel}: pip install --no-deps -r requirements/data.lock")


def read_ts(path: Path) -> tuple[list[Tensor], list[str]]:
    """Series of a ``.ts`` file: tensors (dimensions, length), and their classes; dimensions are parted by colons, the class is last."""
    series, classes, in_data = [], [], False
    for line in path.read_text().splitlines():
        if in_data and line.strip():
            *dimensions, name = line.strip().split(":")
            series.append(torch.tensor([[float(value) for value in part.split(",")] for part in dimensions]))
            classes.append(name)
        in_data = in_data or line.strip().lower() == "@data"
    return series, classes


class Utterances(NamedTuple):
    """Images (n, 1, H, W) with their labels (n,), scaled by the training part's mean and deviation."""

    name: str
    x_train: Tensor
    train: Tensor
    x_test: Tensor
    test: Tensor
    classes: int

    def to(self, device: torch.device) -> "Utterances":
        return Utterances(self.name, *(part.to(device) for part in self[1:5]), self.classes)


def _scaled(name: str, x_train: Tensor, train: Tensor, x_test: Tensor, test: Tensor) -> Utterances:
    mean, deviation = x_train.mean((0, 3), keepdim=True), x_train.std((0, 3), keepdim=True).clamp_min(1e-6)
    for x in (x_train, x_test):  # in place: the commands are gigabytes, read for this alone
        x.sub_(mean).div_(deviation)
    return Utterances(name, x_train, train, x_test, test, int(train.max()) + 1)


def read_wav(path: Path) -> Tensor:
    """The samples of a file, in [−1, 1).

    Raises:
        ValueError: if it is not one channel of 16 bits at 16 kHz, as all of Google's commands are.
    """
    with wave.open(str(path)) as file:
        found = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
        if found != (1, 16, RATE):
            raise ValueError(f"{path}: expected 1 channel, 16 bits, {RATE} Hz, got {found}")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return torch.from_numpy(samples.astype(np.float32)) / 2**15


def spectrogram(sound: Tensor) -> Tensor:
    """(160, 101): logarithms of the magnitudes below 8 kHz, of mean 0 and deviation 1, and zeros after the sound's end."""
    found = torch.stft(
        sound[:RATE], WINDOW, STEP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True
    )
    found = found[:BINS].abs().log1p()
    found = (found - found.mean()) / found.std().clamp_min(1e-4)
    return torch.nn.functional.pad(found, (0, FRAMES - found.shape[1]))


@functools.cache
def read_commands(folder: Path) -> Utterances:
    """Google's commands as they are unpacked: CLASS/*.wav, of which testing_list.txt names the test's and validation_list.txt
    those that are left out; folders whose names begin with ``_`` are noise and no class."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    left_out, tested = (set((folder / f"{part}_list.txt").read_text().split()) for part in ("validation", "testing"))
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.wav")):
            if (said := f"{name}/{path.name}") not in left_out:
                parts["test" if said in tested else "train"].append((path, label))
    found = []
    for part in parts.values():
        x = torch.empty(len(part), 1, BINS, FRAMES)
        for place, (path, _) in enumerate(part):
            x[place, 0] = spectrogram(read_wav(path))
        found += [x, torch.tensor([label for _, label in part])]
    return _scaled("Google commands", *found)


def utterances(folder: Path | None) -> Utterances:
    """Google's commands, if the folder is theirs or holds theirs: spectrograms in ``commands-train.npz`` and ``commands-test.npz``
    (x: (n, 160, 101), y: (n,)), or else the WAV files beside a testing_list.txt. Without them JapaneseVowels: 12 coefficients
    over time, the folder's or those of the wheel aeon, with zeros after their end."""
    if folder and (folder / "commands-train.npz").exists():
        read = [np.load(folder / f"commands-{part}.npz") for part in ("train", "test")]
        loaded = [torch.from_numpy(part[name]) for part in read for name in ("x", "y")]
        return _scaled("Google commands", *(v.float().unsqueeze(1) if v.dim() == 3 else v.long() for v in loaded))
    lists = [*folder.glob("testing_list.txt"), *sorted(folder.glob("*/testing_list.txt"))] if folder else []
    if lists:
        return read_commands(lists[-1].parent)
    name = "JapaneseVowels"
    if not folder or not (folder / name).exists():
        folder = in_wheel("aeon", "datasets/data", "JapaneseVowels")
    read = [read_ts(folder / name / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    index = {label: place for place, label in enumerate(sorted(set(read[0][1])))}
    longest = max(series.shape[1] for part, _ in read for series in part)
    parts: list[Tensor] = []
    for part, labels in read:
        padded = [torch.nn.functional.pad(series, (0, longest - series.shape[1])) for series in part]
        parts += [torch.stack(padded).unsqueeze(1), torch.tensor([index[label] for label in labels])]
    return _scaled(name, *parts)


class Graphs(NamedTuple):
    """Many graphs as one: features of all nodes (n, d), the graph of each node (n,), edges (2, m) both ways, labels (G,)."""

    name: str
    x: Tensor
    graph: Tensor
    edges: Tensor
    labels: Tensor
    classes: int

    def to(self, device: torch.device) -> "Graphs":
        """On that device; a GPU takes them from pinned memory, without a wait."""
        if device.type == "cpu":
            return self
        parts = [part.pin_memory() if device.type == "cuda" else part for part in self[1:5]]
        return Graphs(self.name, *(part.to(device, non_blocking=True) for part in parts), self.classes)


def _numbers(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", dtype=np.int64)


def read_tu(folder: Path) -> Graphs:
    """A set in the format of the TUDatasets; without node labels a node's feature is its degree, up to 20."""
    name = folder.name
    graph = torch.from_numpy(_numbers(folder / f"{name}_graph_indicator.txt")) - 1
    edges = torch.from_numpy(_numbers(folder / f"{name}_A.txt").T.copy()) - 1
    labels = torch.from_numpy(np.unique(_numbers(folder / f"{name}_graph_labels.txt"), return_inverse=True)[1])
    nodes = folder / f"{name}_node_labels.txt"
    kinds = (
        torch.from_numpy(_numbers(nodes)) if nodes.exists() else edges[1].bincount(minlength=len(graph)).clamp_max(20)
    )
    return Graphs(name, torch.nn.functional.one_hot(kinds).float(), graph, edges, labels, int(labels.max()) + 1)


def graphs(folder: Path | None) -> list[Graphs]:
    """Every TU set of the folder, or MUTAG of the wheel grakel."""
    found = sorted(path.parent for path in folder.glob("*/*_graph_indicator.txt")) if folder else []
    return [read_tu(path) for path in found or [in_wheel("grakel", "tests/data/MUTAG", "MUTAG")]]


def part_of(graphs: Graphs, chosen: Tensor) -> Graphs:
    """Those graphs, numbered from 0 in the order of ``chosen``."""
    new = torch.full((len(graphs.labels),), -1).index_put((chosen,), torch.arange(len(chosen)))
    node_kept = new[graphs.graph] >= 0
    node = torch.cumsum(node_kept, 0) - 1
    edges = graphs.edges[:, node_kept[graphs.edges[0]]]
    return Graphs(
        graphs.name,
        graphs.x[node_kept],
        new[graphs.graph[node_kept]],
        node[edges],
        graphs.labels[chosen],
        graphs.classes,
    )
