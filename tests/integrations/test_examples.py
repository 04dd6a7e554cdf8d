"""Every example runs, learns, draws its curve, and computes the loss of the formula in its first ten steps."""

import hashlib
import itertools
import os
import pickle
import re
import runpy
import subprocess
import sys
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from . import library
from .formula import Enough

ROOT = Path(__file__).parents[2]
IN_THE_LEG = os.environ.get("MIXUPE_LIBRARIES") == "1"


class Example(NamedTuple):
    libraries: str
    most: float  # the last line's error, in percent


EXAMPLES = {
    "plain": Example("", 6),
    "segmentation": Example("", 60),
    "multilabel_audio": Example("", 2),
    "text_embeddings": Example("", 20),
    "timm_train": Example("timm", 10),
    "torchvision_train": Example("torchvision", 10),
    "lightning_fit": Example("lightning", 6),
    "transformers_trainer": Example("transformers", 15),
    "accelerate_loop": Example("accelerate", 6),
    "skorch_tabular": Example("skorch", 6),
    "fastai_learner": Example("fastai", 6),
    "graph_readout": Example("torch_geometric", 30),
}
OTHERS = {"shared", "ddp"}  # no example; and one that tests/test_ranks.py runs


def run(*command, folder):
    """(output, seconds of one core): of one thread, for other work on the machine makes threads wait for each other."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLCONFIGDIR": str(folder),
    }
    command = [sys.executable, *map(str, command)]
    before = os.times()
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-3000:])
    after = os.times()
    return done.stdout, after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_first_ten_steps_are_those_of_the_formula(name, followed, tmp_path, monkeypatch):
    for needed in EXAMPLES[name].libraries.split():
        library(needed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [name])
    followed.stops = True
    if name == "fastai_learner":
        followed.returned = torch.float32
    with pytest.raises(Enough):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert followed.mixed == followed.losses == 10


@pytest.mark.skipif(not IN_THE_LEG, reason="whole trainings, of minutes: `make test-matrix LEG=libraries` runs them")
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_learns_within_a_minute(name, tmp_path):
    output, seconds = run(ROOT / "examples" / f"{name}.py", "--curve", "curve.png", folder=tmp_path)
    assert seconds < 60
    lines = [line for line in output.splitlines() if re.match(r"epoch \d+: loss", line)]
    errors = [float(re.search(r"\berror ([\d.]+)", line)[1]) for line in lines]
    assert len(lines) > 3 and errors[-1] <= EXAMPLES[name].most, lines
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_every_example_is_here_and_short():
    files = {file.stem: file for file in (ROOT / "examples").glob("*.py")}
    assert set(files) - OTHERS == set(EXAMPLES)
    for name, file in files.items():
        assert len(file.read_text().splitlines()) <= 120, name


def write_texts(folder):
    lines = [f"the {word} number {i}\t{word}" for i in range(60) for word in ("left", "right")]
    (folder / "texts.tsv").write_text("\n".join(lines))
    return "texts.tsv"


def write_table(folder):
    rows = [f"{i % 7},{i % 2 + 0.1 * (i % 5)},{'yes' if i % 2 else 'no'}" for i in range(400)]
    (folder / "table.csv").write_text("\n".join(["first,second,class", *rows]))
    return "table.csv"


def write_sounds(folder):
    lines = ["file,low,high"]
    for i in range(100):
        tone = 8000 * np.sin(2 * np.pi * (200 + 400 * (i % 2)) * np.arange(900) / 8000)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 900, "NONE", ""))
            file.writeframes(tone.astype(np.int16).tobytes())
        lines.append(f"{i}.wav,{1 - i % 2},{i % 2}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return "."


def write_masks(folder):
    Image = library("PIL.Image")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for i in range(48):
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[i % 8 : i % 8 + 6, 4:12] = 1 + i % 2
        mask[0, 0] = 255
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
        Image.fromarray(np.stack([mask * 60] * 3, 2)).save(folder / f"images/{i}.png")
    return "."


def write_classes(folder):
    Image = library("PIL.Image")
    for part, name, grey in itertools.product(("train", "val"), ("dark", "light"), range(4)):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        value = 40 * grey if name == "dark" else 100 + 40 * grey
        Image.new("RGB", (40, 32), (value,) * 3).save(folder / part / name / f"{grey}.png")
    return "."


@pytest.mark.parametrize(
    ("name", "needed", "write"),
    [
        ("text_embeddings", "", write_texts),
        ("multilabel_audio", "", write_sounds),
        ("skorch_tabular", "skorch", write_table),
        ("segmentation", "torchvision", write_masks),
        ("plain", "torchvision", write_classes),
    ],
)
def test_data_of_ones_own(name, needed, write, tmp_path, monkeypatch, capsys):
    for library_needed in needed.split():
        library(library_needed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [name, "--epochs", "1", "--batch-size", "8", "--data", write(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "epoch 1: loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_torchvisions_folder(name, tmp_path, monkeypatch, capsys):
    """The files of the real set have fixed sums; these are made up, so their sums take the place of the fixed ones."""
    datasets = library("torchvision.datasets")
    kind, field = (datasets.CIFAR10, "labels") if name == "cifar10" else (datasets.CIFAR100, "fine_labels")
    classes = [f"class {i}" for i in range(10)]
    folder = tmp_path / "data" / kind.base_folder
    folder.mkdir(parents=True)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

    draw = np.random.default_rng(0)
    for part in ("train_list", "test_list"):
        rows = {field: [i % 10 for i in range(12)], "data": draw.integers(0, 256, (12, 3072), dtype=np.uint8)}
        monkeypatch.setattr(kind, part, [write(file, rows) for file, _ in getattr(kind, part)])
    meta = {**kind.meta}
    meta["filename"], meta["md5"] = write(meta["filename"], {meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", meta)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["plain", "--epochs", "1", "--batch-size", "6", "--data", name])
    runpy.run_path(str(ROOT / "examples" / "plain.py"), run_name="__main__")
    assert "epoch 1: loss" in capsys.readouterr().out
