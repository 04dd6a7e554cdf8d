"""``python -m bench demo``: the paper's tabular network on two real data sets, by every policy, in one table.

MixupE, §4.2: two hidden layers of 128 units, ReLU, Adam at 1e-3, batches of 100, 25 epochs, five seeds. The data are
handwritten digits (UCI Optdigits) and Iris as scikit-learn ships them, standardised, with a fifth of the rows held out
for the test. α = 0.2 and η = 0.01 are the paper's for speech (§4.3); nothing is tuned here.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mixupe_kernels.ops import backends

from . import data, models, results, timing, training_plots
from .methods import POLICIES, TARGET_RATIO, make_step

DATA_SETS = ("digits", "iris")
ALPHA, ETA = 0.2, 0.01
BATCH, LEARNING_RATE = 100, 1e-3
# Layers this small gain nothing from a second thread (18 against 21 s for the whole demo on two idle cores), and on a
# busy machine the two wait for each other (62 s).
THREADS = 1


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
    """One row of the table: ``cost`` is the step's time over Mixup's, with its quartiles."""

    data_set: str
    policy: str
    error: float
    error_std: float
    cost: float
    cost_low: float
    cost_high: float
    target_met: bool
    backend: str


def train(policy: str, parts: data.Split, classes: int, seed: int, epochs: int) -> list[float]:
    """Test error in percent after each epoch. The seed fixes initialisation, order, λ and partners."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = models.mlp(parts.x_train.shape[1], classes)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    step = make_step(policy, model, optimizer, ALPHA, ETA, generator)
    order = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(epochs):
        for rows in data.batches(len(parts.train), BATCH, order):
            step(parts.x_train[rows], parts.train[rows])
        with torch.no_grad():
            wrong = model(parts.x_test).argmax(1) != parts.test
        errors.append(100 * wrong.float().mean().item())
    return errors


def step_costs(parts: data.Split, classes: int, rounds: int) -> dict[str, timing.Ratio]:
    """Time of each policy's step over Mixup's beside it, each on a model and optimizer of its own."""
    x, labels = parts.x_train[:BATCH], parts.train[:BATCH]
    contenders = {}
    for policy in POLICIES:
        model = models.mlp(x.shape[1], classes)
        step = make_step(policy, model, torch.optim.Adam(model.parameters(), LEARNING_RATE), ALPHA, ETA)
        contenders[policy] = lambda step=step: step(x, labels)
    pairs = timing.interleave_with("mixup", contenders, rounds, warmup=20, min_seconds=5e-3)
    return {policy: timing.ratio(*pair) for policy, pair in pairs.items()}


def show(console: Console, summaries: list[Summary]) -> None:
    """One line a policy, one group of columns a data set."""
    table = Table(
        title=f"What each policy buys, and what its step costs (target: ≤ {TARGET_RATIO}× a Mixup step)", box=box.SIMPLE
    )
    table.add_column("policy", no_wrap=True)
    for name in dict.fromkeys(row.data_set for row in summaries):
        table.add_column(f"{name}\ntest error, %", justify="right", no_wrap=True)
        table.add_column("\nstep / Mixup's", justify="right", no_wrap=True)
    for policy, (label, *_) in POLICIES.items():
        cells = [label]
        for row in summaries:
            if row.policy == policy:
                met = "[green]met[/]" if row.target_met else "[red]not met[/]"
                cells += [f"{row.error:.2f} ± {row.error_std:.2f}", f"{row.cost:.2f}× {met}"]
        table.add_row(*cells)
    console.print(table)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="splits and initialisations to average (default 5)")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the training rows (default 25)")
    parser.add_argument("--rounds", type=int, default=61, help="rounds of the step's timing (default 61)")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "demo", help="where to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    options.out.mkdir(parents=True, exist_ok=True)
    # The table needs 88 columns, and a pipe is said to have 80.
    console, begin = Console(width=None if sys.stdout.isatty() else 100), time.perf_counter()
    backend = backends.serving("cpu")
    curves, summaries = [], []
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=len(DATA_SETS) * len(POLICIES) * options.seeds)
        for name in DATA_SETS:
            table = data.bundled(name)
            progress.update(task, description=f"{name}: timing steps")
            costs = step_costs(data.split(table, 0, validation=0), table.num_classes, options.rounds)
            final = {policy: [] for policy in POLICIES}
            for seed in range(options.seeds):
                parts = data.split(table, seed, validation=0)
                for policy, (label, *_) in POLICIES.items():
                    progress.update(task, description=f"{name}: {label}")
                    errors = train(policy, parts, table.num_classes, seed, options.epochs)
                    curves += [Point(name, policy, seed, epoch, error) for epoch, error in enumerate(errors, 1)]
                    final[policy].append(errors[-1])
                    progress.advance(task)
            for policy, errors in final.items():
                spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
                met = costs[policy].median <= TARGET_RATIO
                summaries.append(Summary(name, policy, statistics.mean(errors), spread, *costs[policy], met, backend))
        progress.update(task, description="done")
    results.write_csv(options.out / "curves.csv", curves, Point)
    results.write_csv(options.out / "summary.csv", summaries, Summary)
    picture = options.out / "demo.png"
    training_plots.demo(options.out / "curves.csv", options.out / "summary.csv", picture)
    show(console, summaries)
    lines = (
        f"Error after {options.epochs} epochs, mean ± standard deviation of {options.seeds} seeds; step / Mixup's: "
        f"median of {options.rounds} paired ratios.",
        f"Backend: [bold]{backend}[/]. torch {torch.__version__}, {THREADS} thread, "
        f"{time.perf_counter() - begin:.0f} s.",
        f"Picture: {picture}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    return 0
