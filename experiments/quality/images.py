"""``python -m experiments quality images``: networks with BatchNorm on small images, by every use of the clean rows.

Two networks, three sets, α of 1 and 0.2, eight seeds that all methods share: split, initialisation, order of the batches, λ
and partners. SGD as in MixupE §4.1 (0.1, a tenth of it from a half and a hundredth from three quarters on, momentum 0.9,
weight decay 1e-4), batches of 128, of which 1/4 is 32. At equal epochs each method trains as long as Mixup in epochs, at
equal time as long in seconds, by the costs of a step measured here. Nothing is chosen on test rows: the temperature, and
(γ, η) of the rows called "chosen", are fitted on validation rows. A rerun trains what is missing in runs.csv.
"""

import argparse
import functools
import itertools
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bench import results, timing
from bench.methods import make_step

from .. import calibration, data, image_data
from ..frame import RESULTS
from . import plots, summary
from .plan import ETA, KEY, MIXUP, NETWORKS, SEEDS, UPDATE_BN, Cell, Cost, Method, Run, key_of, plan

BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 128, 0.1, 0.9, 1e-4
ROUNDS = 31

split = functools.cache(lambda name, seed: image_data.SETS[name].split(seed))


def build(network: str, data_set: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = NETWORKS[network].build(image_data.CLASSES, flat=image_data.SETS[data_set].flat)
    return model.to(memory_format=torch.channels_last)


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)


def first_variance(model: nn.Module, x: Tensor) -> float:
    """The first BatchNorm's running variance over the variance of its inputs for ``x``, means over the channels."""
    layer = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    seen = []
    with (
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].var((0, 2, 3)).mean())),
        torch.no_grad(),
    ):
        model(x)
    return (layer.running_var.mean() / seen[0]).item()


def evaluate(model: nn.Module, parts: data.Split) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        validation, test = model(parts.x_validation), model(parts.x_test)
    scale = calibration.temperature(validation, parts.validation)
    held = calibration.figures(validation, parts.validation, scale)
    error, *rest = calibration.figures(test, parts.test, scale)
    figures = dict(zip(calibration.Figures._fields[1:], rest, strict=True))
    variance = first_variance(model, parts.x_train)
    return {"validation_error": held.error, "validation_nll": held.nll, "test_error": error, "temperature": scale,
            "first_variance": variance, **figures}  # fmt: skip


def train(cell: Cell, seed: int) -> list[Run]:
    """One network; two rows for Mixup, whose running statistics are then those of clean rows by ``update_bn``."""
    begin, parts, method = time.process_time(), split(cell.data_set, seed), cell.method
    model = build(cell.network, cell.data_set, seed)
    optimizer = optimizer_of(model)
    step = make_step(method.policy, model, optimizer, cell.alpha, method.eta, torch.Generator().manual_seed(seed))
    order = torch.Generator().manual_seed(seed)
    for epoch in range(cell.epochs):
        drops = (2 * epoch >= cell.epochs) + (4 * epoch >= 3 * cell.epochs)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.1**drops
        for rows in data.batches(len(parts.train), BATCH, order):
            step(parts.x_train[rows], parts.train[rows])
    seconds = time.process_time() - begin

    def run(method: Method) -> Run:
        where = {**cell._asdict(), **method._asdict(), "method": method.name, "seed": seed, "seconds": seconds}
        del where["name"]
        return Run(**where, **evaluate(model, parts))

    runs = [run(method)]
    if method == MIXUP:
        update_bn(list(parts.x_train.split(BATCH)), model)
        runs.append(run(UPDATE_BN))
    return runs


def measure_costs(data_set: str, network: str, rounds: int = ROUNDS) -> list[Cost]:
    """Steps of every form on models of their own, in turns beside Mixup's, by CPU time: other processes take turns too."""
    parts = split(data_set, 0)
    x, labels = parts.x_train[:BATCH], parts.train[:BATCH]
    contenders, forms = {}, {}
    for method in (*KEY, Method("split", 1 / 8, 1 / 8, ETA)):
        key = f"{method.name} {method.fraction}"
        model = build(network, data_set, 0)
        step = make_step(method.policy, model, optimizer_of(model), 1.0, method.eta)
        contenders[key], forms[key] = functools.partial(step, x, labels), method
    model = build(network, data_set, 0)
    contenders["update_bn"], forms["update_bn"] = lambda: update_bn([x], model), UPDATE_BN
    mixup = f"{MIXUP.name} {MIXUP.fraction}"
    pairs = timing.interleave_with(mixup, contenders, rounds, 3, 2e-2, clock=time.process_time)
    return [
        Cost(data_set, network, forms[key].name, forms[key].fraction, *timing.ratio(*pair))
        for key, pair in pairs.items()
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments quality images", description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", default=list(image_data.SETS), choices=list(image_data.SETS))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, help="of every network, instead of its own")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of the steps' timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--costs-only", action="store_true", help="measure step times, for a run to come, and stop")
    parser.add_argument(
        "--tables-only", action="store_true", help="train nothing: tables and pictures of what is there"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-images", help="where to write")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    torch.set_num_threads(options.threads)
    store, cost_store = options.out / "runs.csv", options.out / "costs.csv"
    runs = results.read_csv(store, Run) if store.exists() else []
    costs = results.read_csv(cost_store, Cost) if cost_store.exists() else []
    columns = (TextColumn("{task.description:58}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        places = list(itertools.product(options.sets, options.networks))
        task = progress.add_task("timing steps", total=len(places))
        for data_set, network in places:
            if not any((cost.data_set, cost.network) == (data_set, network) for cost in costs):
                progress.update(task, description=f"{data_set}, {network}: timing steps")
                costs += measure_costs(data_set, network, options.rounds)
                results.write_csv(cost_store, costs, Cost)
            progress.advance(task)
        if options.costs_only:
            return 0
        cells = plan(costs, options.sets, options.networks, options.epochs)
        done = set(map(key_of, runs))
        task = progress.add_task("training", total=len(cells) * options.seeds)
        for cell, seed in itertools.product(cells, range(options.seeds)):
            if (cell, seed) not in done and not options.tables_only:
                label = summary.label(cell.method)
                progress.update(task, description=f"{cell.data_set}, {cell.network}, α = {cell.alpha:g}: {label}")
                for run in train(cell, seed):
                    runs.append(run)
                    results.append_csv(store, run, Run)
            progress.advance(task)
    summaries = summary.summarise(runs, costs)
    results.write_csv(options.out / "summary.csv", summaries, summary.Summary)
    results.write_csv(options.out / "bars.csv", summary.bars(summaries), summary.Bar)
    summary.show(console, summaries)
    for alpha in sorted({row.alpha for row in summaries}):
        plots.images(options.out / "summary.csv", alpha, options.out / f"images-alpha-{alpha:g}.png")
    console.print(f"Results and pictures: {options.out}", soft_wrap=True)
    return 0
