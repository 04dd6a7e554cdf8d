"""Accelerate: prepared loaders, dispatched batches, accumulation, and two processes on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import mixupe_kernels as mk

from . import library

accelerate = library("accelerate")


def data(count=32):
    torch.manual_seed(0)
    return TensorDataset(torch.randn(count, 6, dtype=torch.get_default_dtype()), torch.randint(4, (count,)))


def train(dispatch=None, steps=1, check=True):
    """Batches' rows, in the natural loop."""
    options = accelerate.DataLoaderConfiguration(dispatch_batches=dispatch)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=options, gradient_accumulation_steps=steps)
    model = mk.split_batch_norm(
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
    )
    mixup_fn, criterion = mk.MixupE(clean_fraction=1 / 2), mk.MixupELoss(eta=0.1, clean_weight=1 / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), 8))
    rows = []
    for _ in range(3):
        for x, labels in loader:
            with accelerator.accumulate(model):
                x, target = mixup_fn(x, labels)
                loss = criterion(mk.forward_mixupe(model, x, target), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            rows.append((len(x), target.num_mixed))
            gathered = accelerator.gather_for_metrics(mk.clean_rows(torch.zeros(len(x), 4), target)[1])
            assert len(gathered) == (len(x) - target.num_mixed) * accelerator.num_processes
    weights = torch.cat([value.detach().reshape(1, -1) for value in model.parameters()], 1)
    return rows, accelerator.gather(weights), accelerator.is_main_process


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_natural_loop(dispatch, steps, followed):
    assert set(train(dispatch, steps)[0]) == {(16, 8)}
    assert followed.losses == followed.mixed == 10


@pytest.mark.parametrize("dispatch", [False, True])
def test_two_processes(dispatch):
    """torchrun of this file: each process mixes its own part of a batch, and all keep the same weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.integrations.test_accelerate", str(int(dispatch))],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same weights in 2 processes") == 1


def test_slices_of_a_target():
    """What Accelerate does to batches between processes keeps the type, and not the counts: mix after it."""
    from accelerate.utils import send_to_device, slice_tensors

    _, target = mk.MixupE(clean_fraction=1 / 2)(torch.randn(8, 3), torch.randint(4, (8,)))
    moved = send_to_device(target, "cpu")
    assert isinstance(moved, mk.MixedTarget) and moved.num_mixed == 8
    half = slice_tensors(target, slice(0, 4))
    with pytest.raises(ValueError, match=r"target.num_mixed must be in \[0, 4\], got 8: write target.rows.*dispatch"):
        mk.MixupELoss()(torch.randn(4, 4), half)
    assert isinstance(half, mk.MixedTarget)


def main(dispatch):
    rows, weights, is_main = train(dispatch)
    assert set(rows) == {(16, 8)} and len(rows) == 6, rows
    assert len(weights) == 2 and torch.equal(weights[0], weights[1])
    if is_main:
        print("same weights in 2 processes")


if __name__ == "__main__":
    main(bool(int(sys.argv[1])))
