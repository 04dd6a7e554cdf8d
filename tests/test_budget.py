"""How much of our Python a training step runs: few calls, in few files, so that it can be followed and costs little."""

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: once another backend was chosen, operators are called through one function more.
COUNT = """
import torch
import mixupe_kernels as mk
from tests.followed import followed

def batch(rows, classes, **options):
    mixer = mk.MixupE(**options)
    x, labels = torch.randn(rows, 8), torch.randint(classes, (rows,))
    return mixer, x, labels

def check(what, calls, most_calls, most_files):
    files = sorted({file for file, _ in calls})
    assert len(calls) <= most_calls and len(files) <= most_files, (what, len(calls), calls, files)
"""

MIXER = """
for options, most_calls in (({}, 20), ({"regularize": "mixed"}, 20), ({"alpha": 0.2, "clean_fraction": 1 / 8}, 22)):
    mixer, x, labels = batch(128, 10, **options)
    mixer(x, labels)
    check(options, followed(lambda: mixer(x, labels)), most_calls, 7)
"""

CRITERION = """
def soft(labels, classes):
    return torch.nn.functional.one_hot(labels, classes).float()

for kind, rows, classes in (("labels", 128, 10), ("soft labels", 128, 10), ("above 16 MiB", 512, 10_000)):
    mixer, x, labels = batch(rows, classes, clean_fraction=1 / 4)
    _, target = mixer(x, soft(labels, classes) if kind == "soft labels" else labels)
    logits = torch.randn(len(target.lam), classes, requires_grad=True)
    criterion, losses = mk.MixupELoss(), []
    criterion(logits, target)
    check(kind, followed(lambda: losses.append(criterion(logits, target))), 15, 7)
    check(kind, followed(lambda: losses[0].backward()), 8, 3)
"""

STEP = """
mixer, x, labels = batch(128, 10, clean_fraction=1 / 4)
model, criterion = torch.nn.Linear(8, 10), mk.MixupELoss()

def step():
    rows, target = mixer(x, labels)
    criterion(model(rows), target).backward()

step()
check("step", followed(step), 40, 8)
"""


@pytest.mark.parametrize("body", [MIXER, CRITERION, STEP], ids=["mixer", "criterion", "step"])
def test_calls_and_files(body):
    done = subprocess.run(
        [sys.executable, "-c", COUNT + body], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
