"""Every example runs, learns, draws its curve, and computes the loss of the formula in its first ten steps."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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
    "graph_readout": Example("torch_geometric", 25),
}
OTHERS = {"shared", "ddp"}  # no example; and one that tests/test_distributed.py runs


def run(*command, folder):
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",
        "MPLBACKEND": "Agg",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLCONFIGDIR": str(folder),
    }
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-3000:])
    return done.stdout


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
    begin = time.perf_counter()
    output = run(ROOT / "examples" / f"{name}.py", "--curve", "curve.png", folder=tmp_path)
    assert time.perf_counter() - begin < 60 * float(os.environ.get("MIXUPE_SLOWER", "1"))
    lines = [line for line in output.splitlines() if re.match(r"epoch \d+: loss", line)]
    errors = [float(re.search(r"\berror ([\d.]+)", line)[1]) for line in lines]
    assert len(lines) > 3 and errors[-1] <= EXAMPLES[name].most, lines
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_every_example_is_here_and_short():
    files = {file.stem: file for file in (ROOT / "examples").glob("*.py")}
    assert set(files) - OTHERS == set(EXAMPLES)
    for name, file in files.items():
        assert len(file.read_text().splitlines()) <= 120, name
