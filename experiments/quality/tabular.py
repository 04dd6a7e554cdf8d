"""``python -m experiments quality``: test error of each policy on tabular data, at equal epochs and at equal training time.

``python -m experiments quality images`` is of networks with BatchNorm: experiments/quality/images.py.

The protocol of MixupE's Table 4: the network of §4.2, Adam at 1e-3, batches of 100, 25 epochs, five seeds; one-hot
categories, mean and mode imputation, standardised. Each seed has its own stratified split, 60 % to train, 20 % to choose
(α, η) by, 20 % to test; a seed's choice looks at its own validation rows only. At equal time every policy trains for as
long as 25 epochs of the full policy take, by the step costs measured here on the data set's own shapes.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import results
from bench.methods import ERM_AND_REGULARIZER, POLICIES, TABULAR

from .. import data, ensemble
from ..frame import RESULTS
from . import demo, images, plots

# (alphas, etas); "paper" is §4.2's, "small" every third of its alphas and every other of its etas.
GRIDS = {
    "small": ((0.02, 0.2, 2.0), (1e-3, 0.1)),
    "paper": ((0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0), (1e-4, 1e-3, 1e-2, 0.1, 1.0)),
}
# MixupE, Table 4: test error % of ERM, Mixup and MixupE.
PAPER = {
    "balance-scale": (3.87, 3.70, 3.68),
    "cmc": (45.77, 46.67, 45.42),
    "iris": (9.06, 8.14, 7.29),
    "letter": (4.56, 3.71, 4.04),
    "optdigits": (1.48, 1.15, 1.33),
}
PAPER_POLICIES = ("erm", "mixup", "full")
ROBUSTNESS_SET, CORRUPTIONS = "optdigits", (0.2, 0.5, 0.8)
# The mixup paper's 4/255 (§3.5) as a share of each feature's range; on 17 grey levels that is a quarter of one, so a
# stronger attack stands beside it.
FGSM_STEPS = (4 / 255, 32 / 255)
EPOCHS, TIME = "epochs", "time"
THREADS_HELP = "threads (default 1: layers this small gain little from more, and on a busy machine wait for each other)"


@dataclasses.dataclass
class Run:
    """One trained network at one checkpoint: errors in percent, ``cost`` its step's time over Mixup's."""

    data_set: str
    corrupted: float
    policy: str
    budget: str
    seed: int
    alpha: float
    eta: float
    cost: float
    epochs: int
    validation_error: float
    test_error: float
    fgsm_error: float
    strong_fgsm_error: float


@dataclasses.dataclass
class Summary:
    """The seeds' chosen runs of one policy. ``difference`` is to the full policy, paired by seed, with its p-value.

    ``paper`` is Table 4's figure, where there is one.
    """

    data_set: str
    corrupted: float
    policy: str
    budget: str
    epochs: int
    cost: float
    error: float
    error_std: float
    fgsm_error: float
    strong_fgsm_error: float
    difference: float
    difference_error: float
    p_value: float
    paper: float | None


@dataclasses.dataclass
class Cost:
    """The time of a policy's step over Mixup's on one data set's shapes, with the quartiles of the rounds' ratios."""

    data_set: str
    policy: str
    median: float
    low: float
    high: float


def measure_costs(table: data.Table, rounds: int = 201) -> list[Cost]:
    task = demo.tabular(table, TABULAR)
    measured = demo.step_costs(task, task.parts(0), rounds)
    return [Cost(table.name, policy, *cost) for policy, cost in measured.items()]


def grid(policy: str, name: str, seeds: int) -> list[ensemble.Member]:
    """Every seed at every grid point that the policy's training depends on."""
    alphas, etas = GRIDS[name]
    if policy == "erm":
        alphas, etas = (1.0,), (0.0,)
    elif policy == "mixup":
        etas = (0.0,)
    elif policy == ERM_AND_REGULARIZER:  # α enters by w only, which scales η
        alphas = (1.0,)
    return [ensemble.Member(*point) for point in itertools.product(range(seeds), alphas, etas)]


def train_case(
    table: data.Table,
    corrupted: float,
    policy: str,
    members: list[ensemble.Member],
    cost: float,
    checkpoints: dict[str, int],
    device: torch.device | str = "cpu",
) -> list[Run]:
    """Train all members; one run for each member and checkpoint. Only training labels are corrupted."""
    splits = {}
    for seed in {member.seed for member in members}:
        parts = data.split(table, seed)
        parts = parts._replace(train=data.corrupt(parts.train, corrupted, table.num_classes, seed))
        splits[seed] = data.Split(*(part.to(device) for part in parts))
    order = [splits[member.seed] for member in members]
    stacked = {
        name: torch.stack([getattr(parts, name) for parts in order])
        for name in ("x_validation", "validation", "x_test", "test")
    }
    reach = torch.stack([parts.x_train.amax(0) - parts.x_train.amin(0) for parts in order]).unsqueeze(1)
    runs = []
    for epoch, network in enumerate(
        ensemble.train(policy, members, splits, table.num_classes, max(checkpoints.values())), 1
    ):
        for budget, epochs in checkpoints.items():
            if epoch != epochs:
                continue
            figures = [
                ensemble.errors(network, stacked["x_validation"], stacked["validation"]),
                ensemble.errors(network, stacked["x_test"], stacked["test"]),
                *(
                    ensemble.fgsm_errors(network, stacked["x_test"], stacked["test"], step * reach)
                    for step in FGSM_STEPS
                ),
            ]
            runs += [
                Run(table.name, corrupted, policy, budget, *member, cost, epochs, *errors)
                for member, errors in zip(members, torch.stack(figures, 1).tolist(), strict=True)
            ]
    return runs


def choose(runs: Iterable[Run]) -> dict[int, Run]:
    """For each seed the run with the lowest validation error; the first of the grid where several share it."""
    best: dict[int, Run] = {}
    for run in runs:
        if run.seed not in best or run.validation_error < best[run.seed].validation_error:
            best[run.seed] = run
    return best


def paired(chosen: dict[int, Run], full: dict[int, Run]) -> tuple[float, float, float]:
    """(mean difference of test errors, its standard error, two-sided p) of a paired t-test over the seeds."""
    from scipy import stats

    differences = [chosen[seed].test_error - full[seed].test_error for seed in sorted(chosen)]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    if error == 0:
        return mean, error, 1.0 if mean == 0 else 0.0
    return mean, error, 2 * float(stats.t.sf(abs(mean) / error, len(differences) - 1))


def summarise(runs: list[Run]) -> list[Summary]:
    """One summary for each data set, corruption, budget and policy whose full policy has been trained too."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.data_set, run.corrupted, run.budget, run.policy), []).append(run)
    summaries = []
    for (name, corrupted, budget, policy), group in groups.items():
        full = groups.get((name, corrupted, budget, "full"))
        if full is None:
            continue
        chosen = choose(group)
        test = [run.test_error for run in chosen.values()]
        paper = None
        if not corrupted and budget == EPOCHS and policy in PAPER_POLICIES and name in PAPER:
            paper = PAPER[name][PAPER_POLICIES.index(policy)]
        summaries.append(
            Summary(
                name, corrupted, policy, budget, group[0].epochs, group[0].cost, statistics.mean(test),
                statistics.stdev(test) if len(test) > 1 else 0.0,
                statistics.mean(run.fgsm_error for run in chosen.values()),
                statistics.mean(run.strong_fgsm_error for run in chosen.values()),
                *paired(chosen, choose(full)), paper,
            )
        )  # fmt: skip
    return summaries


def bar(summaries: list[Summary], name: str) -> tuple[str, Summary]:
    """At equal time: the cheap policy with the least error, and whether it is within one standard error of full."""
    cheap = [
        row for row in summaries
        if (row.data_set, row.corrupted, row.budget) == (name, 0, TIME) and row.policy in ("sample", "split", "mixed")
    ]  # fmt: skip
    best = min(cheap, key=lambda row: row.error)
    return ("met" if best.difference <= best.difference_error else "not met"), best


def label(policy: str) -> str:
    return POLICIES[policy].label if policy in POLICIES else "ERM + R"


def show(console: Console, summaries: list[Summary], name: str, corrupted: float) -> None:
    """One data set's table: both budgets side by side."""
    rows = {(row.policy, row.budget): row for row in summaries if (row.data_set, row.corrupted) == (name, corrupted)}
    title = f"{name}, {corrupted:.0%} of training labels corrupted" if corrupted else name
    table = Table(title=title, box=box.SIMPLE)
    headers = ("", "step", "error %", "p", "paper", "epochs", "error %, equal time", "p", "FGSM, strong")
    for header in headers:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for policy in dict.fromkeys(policy for policy, _ in rows):
        row, timed = rows[policy, EPOCHS], rows.get((policy, TIME))
        after = ["", "", ""] if timed is None else [
            str(timed.epochs), f"{timed.error:.2f} ± {timed.error_std:.2f}", f"{timed.p_value:.2f}"
        ]  # fmt: skip
        table.add_row(
            label(policy), f"{row.cost:.2f}×", f"{row.error:.2f} ± {row.error_std:.2f}", f"{row.p_value:.2f}",
            "" if row.paper is None else f"{row.paper:.2f}", *after, f"{row.fgsm_error:.1f}, {row.strong_fgsm_error:.1f}",
        )  # fmt: skip
    console.print(table)
    if not corrupted:
        verdict, best = bar(summaries, name)
        console.print(
            f"Best of sample, split, mixed at equal time no worse than full by one standard error: {verdict} "
            f"({label(best.policy)}, {best.difference:+.2f} ± {best.difference_error:.2f} points)",
            soft_wrap=True,
        )


def cases(tables: list[data.Table]) -> list[tuple[data.Table, float, tuple[str, ...]]]:
    """(data set, share of corrupted labels, policies): all sets clean, and the robustness cases of one."""
    found = [(table, 0.0, TABULAR) for table in tables]
    for table in tables:
        if table.name == ROBUSTNESS_SET:
            found[tables.index(table)] = (table, 0.0, (*TABULAR, ERM_AND_REGULARIZER))
            found += [(table, share, TABULAR) for share in CORRUPTIONS]
    return found


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["images"]:
        return images.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m experiments quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of ARFF and CSV files, the class in the last column")
    parser.add_argument("--bundled", nargs="*", default=data.BUNDLED, choices=data.BUNDLED, help="scikit-learn's sets")
    parser.add_argument("--grid", choices=tuple(GRIDS), default="small", help="values of α and η")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1, help=THREADS_HELP)
    parser.add_argument("--costs-only", action="store_true", help="measure step times, for a run to come, and stop")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of an earlier call instead of resuming")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality", help="where to write")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console, begin = Console(width=None if sys.stdout.isatty() else 125), time.perf_counter()
    torch.set_num_threads(options.threads)
    store, cost_store = options.out / "runs.csv", options.out / "costs.csv"
    runs = results.read_csv(store, Run) if store.exists() and not options.fresh else []
    all_costs = results.read_csv(cost_store, Cost) if cost_store.exists() and not options.fresh else []
    tables = [data.bundled(name) for name in options.bundled] + (data.folder(options.data) if options.data else [])
    todo = cases(sorted(tables, key=lambda table: len(table.labels)))
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("timing steps", total=len(tables))
        for table in tables:
            if not any(cost.data_set == table.name for cost in all_costs):
                progress.update(task, description=f"{table.name}: timing steps")
                all_costs += measure_costs(table)
                results.write_csv(cost_store, all_costs, Cost)
            progress.advance(task)
        if options.costs_only:
            return 0
        task = progress.add_task("training", total=sum(len(policies) for *_, policies in todo))
        for table, corrupted, policies in todo:
            costs = {cost.policy: cost.median for cost in all_costs if cost.data_set == table.name}
            for policy in policies:
                what = f"{table.name}{f', {corrupted:.0%} corrupted' if corrupted else ''}: {label(policy)}"
                progress.update(task, description=what)
                if not any(
                    (run.data_set, run.corrupted, run.policy) == (table.name, corrupted, policy) for run in runs
                ):
                    checkpoints = {EPOCHS: options.epochs}
                    cost = costs.get(policy, costs["erm"])
                    if not corrupted and policy in POLICIES:
                        checkpoints[TIME] = max(1, round(options.epochs * costs["full"] / cost))
                    members = grid(policy, options.grid, options.seeds)
                    runs += train_case(table, corrupted, policy, members, cost, checkpoints)
                    results.write_csv(store, runs, Run)
                progress.advance(task)
    summaries = summarise(runs)
    results.write_csv(options.out / "summary.csv", summaries, Summary)
    plots.quality(options.out / "summary.csv", options.out / "quality.png")
    for table, corrupted, _ in todo:
        show(console, summaries, table.name, corrupted)
    if any(corrupted for _, corrupted, _ in todo):
        plots.robustness(options.out / "summary.csv", options.out / "robustness.png")
    console.print(
        "step: time over Mixup's. p: paired t-test against full. paper: MixupE, Table 4. FGSM: test error at 4/255 and "
        "32/255 of each feature's range, at equal epochs.",
        soft_wrap=True,
    )
    console.print(f"{time.perf_counter() - begin:.0f} s. Results and pictures: {options.out}", soft_wrap=True)
    return 0
