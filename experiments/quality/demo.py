"""``python -m experiments demo``: the paper's tabular network, and one with BatchNorm on images, by each policy, in one table.

MixupE, §4.2: two hidden layers of 128 units, ReLU, Adam at 1e-3, batches of 100, 25 epochs, five seeds. The data are
handwritten digits (UCI Optdigits) and Iris as scikit-learn ships them, standardised, with a fifth of the rows held out
for the test; α = 0.2 and η = 0.01 are the paper's for speech (§4.3). The digits are then images for a small CNN, 512 of
them to train with and 1000 to test: SGD, batches of 128, 25 epochs, α = 1 and η = 1e-3, the paper's for images (§4.1).
Nothing is tuned here.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from bench import models, results, timing
from bench.methods import POLICIES, TABULAR, TARGET_RATIO, make_step
from mixupe_kernels.ops import backends

from .. import calibration, data, image_data
from ..frame import RESULTS
from . import plots

# Layers this small gain nothing from a second thread (18 against 21 s for the two tabular sets on two idle cores), and on a
# busy machine the two wait for each other (62 s).
THREADS = 1


class Task(NamedTuple):
    """What is trained: a network and its optimizer on the parts of a seed, by each of ``policies``."""

    name: str
    parts: Callable[[int], data.Split]
    model: Callable[[], nn.Module]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    batch: int
    alpha: float
    eta: float
    policies: tuple[str, ...]


def tabular(table: data.Table, policies: tuple[str, ...], validation: float = 0.2) -> Task:
    """The paper's tabular network on a table."""
    width = data.split(table, 0).x_train.shape[1]
    return Task(
        table.name,
        lambda seed: data.split(table, seed, validation=validation),
        lambda: models.mlp(width, table.num_classes),
        functools.partial(torch.optim.Adam, lr=1e-3),
        100,
        0.2,
        0.01,
        policies,
    )


def pictures() -> Task:
    """A small CNN with BatchNorm on the digits as images."""
    return Task(
        "digits 8×8, CNN",
        image_data.SETS["digits"].split,
        lambda: models.small_cnn(image_data.CLASSES).to(memory_format=torch.channels_last),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True),
        128,
        1.0,
        1e-3,
        ("erm", "mixup", "authors", "sample", "recipe"),
    )


def tasks() -> list[Task]:
    policies = (*TABULAR, "recipe")
    return [*(tabular(data.bundled(name), policies, validation=0) for name in ("digits", "iris")), pictures()]


@dataclasses.dataclass
class Point:
    """One point of a learning curve."""

    data_set: str
    policy: str
    seed: int
    epoch: int
    test_error_percent: float


@dataclasses.dataclass
class Summary:
    """One row of the table: error and ECE in percent; ``cost`` is the step's time over Mixup's, with its quartiles."""

    data_set: str
    policy: str
    error: float
    error_std: float
    ece: float
    cost: float
    cost_low: float
    cost_high: float
    target_met: bool
    backend: str


class Trained(NamedTuple):
    """Test errors after each epoch, and the ECE after the last, in percent."""

    errors: list[float]
    ece: float


def train(task: Task, policy: str, parts: data.Split, seed: int, epochs: int) -> Trained:
    """One network. The seed fixes initialisation, order, λ and partners."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = task.model()
    step = make_step(POLICIES[policy], model, task.optimizer(model.parameters()), task.alpha, task.eta, generator)
    order = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(epochs):
        model.train()
        for rows in data.batches(len(parts.train), task.batch, order):
            step(parts.x_train[rows], parts.train[rows])
        model.eval()
        with torch.no_grad():
            logits = model(parts.x_test)
        errors.append(100 * (logits.argmax(1) != parts.test).float().mean().item())
    return Trained(errors, calibration.expected_calibration_error(logits, parts.test))


def step_costs(task: Task, parts: data.Split, rounds: int) -> dict[str, timing.Ratio]:
    """Time of each policy's step over Mixup's beside it, each on a model and optimizer of its own.

    CPU time, which other processes on the machine do not lengthen; there is one thread.
    """
    x, labels = parts.x_train[: task.batch], parts.train[: task.batch]
    contenders = {}
    for policy in task.policies:
        model = task.model()
        step = make_step(POLICIES[policy], model, task.optimizer(model.parameters()), task.alpha, task.eta)
        contenders[policy] = functools.partial(step, x, labels)
    pairs = timing.interleave_with("mixup", contenders, rounds, 20, 5e-3, clock=time.process_time)
    return {policy: timing.ratio(*pair) for policy, pair in pairs.items()}


def show(console: Console, summaries: list[Summary]) -> None:
    """One line a policy, one group of columns a data set."""
    table = Table(
        title=f"What each policy buys, and what its step costs (target: ≤ {TARGET_RATIO}× a Mixup step)", box=box.SIMPLE
    )
    table.add_column("policy", no_wrap=True)
    names = list(dict.fromkeys(row.data_set for row in summaries))
    for name in names:
        for header in (f"{name}\ntest error, %", "\nECE", "\nstep"):
            table.add_column(header, justify="right", no_wrap=True)
    rows = {(row.data_set, row.policy): row for row in summaries}
    for policy in (policy for policy in POLICIES if any(policy == row.policy for row in summaries)):
        cells = [POLICIES[policy].label]
        for name in names:
            row = rows.get((name, policy))
            if row is None:
                cells += ["–"] * 3
                continue
            colour = "green" if row.target_met else "red"
            cells += [f"{row.error:.2f} ± {row.error_std:.2f}", f"{row.ece:.1f}", f"[{colour}]{row.cost:.2f}×[/]"]
        table.add_row(*cells, style="bold" if policy == "recipe" else None)
    console.print(table)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="splits and initialisations to average (default 5)")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the training rows (default 25)")
    parser.add_argument("--rounds", type=int, default=61, help="rounds of the step's timing (default 61)")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo", help="where to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    options.out.mkdir(parents=True, exist_ok=True)
    # The table needs 116 columns, and a pipe is said to have 80.
    console, begin = Console(width=None if sys.stdout.isatty() else 120), time.perf_counter()
    backend = backends.serving("cpu")
    curves, summaries = [], []
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        todo = tasks()
        bar = progress.add_task("training", total=sum(len(task.policies) for task in todo) * options.seeds)
        for task in todo:
            progress.update(bar, description=f"{task.name}: timing steps")
            costs = step_costs(task, task.parts(0), options.rounds)
            final = {policy: [] for policy in task.policies}
            for seed in range(options.seeds):
                parts = task.parts(seed)
                for policy in task.policies:
                    progress.update(bar, description=f"{task.name}: {POLICIES[policy].label}")
                    trained = train(task, policy, parts, seed, options.epochs)
                    curves += [
                        Point(task.name, policy, seed, epoch, error) for epoch, error in enumerate(trained.errors, 1)
                    ]
                    final[policy].append((trained.errors[-1], trained.ece))
                    progress.advance(bar)
            for policy, figures in final.items():
                errors, eces = zip(*figures, strict=True)
                spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
                met = costs[policy].median <= TARGET_RATIO
                means = statistics.mean(errors), spread, statistics.mean(eces)
                summaries.append(Summary(task.name, policy, *means, *costs[policy], met, backend))
        progress.update(bar, description="done")
    results.write_csv(options.out / "curves.csv", curves, Point)
    results.write_csv(options.out / "summary.csv", summaries, Summary)
    picture = options.out / "demo.png"
    plots.demo(options.out / "curves.csv", options.out / "summary.csv", picture)
    show(console, summaries)
    lines = (
        f"Error after {options.epochs} epochs, mean ± standard deviation of {options.seeds} seeds. ECE: expected "
        f"calibration error, points. step: its time over Mixup's, median of {options.rounds} paired ratios.",
        f"Backend: [bold]{backend}[/]. torch {torch.__version__}, {THREADS} thread, "
        f"{time.perf_counter() - begin:.0f} s.",
        f"Picture: {picture}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    return 0
