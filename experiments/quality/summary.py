"""Tables of ``python -m experiments quality images``: every method paired by seed against Mixup and the authors' two calls."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.methods import TARGET_RATIO

from .plan import (
    AUTHORS,
    ERM,
    ETAS,
    KEY,
    MIXUP,
    NETWORKS,
    RECIPE,
    UPDATE_BN,
    Cost,
    Method,
    Run,
    alpha_of,
    cost_of,
    epochs_at_equal_time,
    key_of,
)  # fmt: skip

EPOCHS, TIME = "epochs", "time"
# (γ, η) chosen by each seed's validation rows, of all at RECIPE's rows and form.
CHOSEN = Method("chosen", 1 / 4)
SHOWN = (ERM, MIXUP, UPDATE_BN, *KEY[2:], CHOSEN)


@dataclasses.dataclass
class Summary:
    """The seeds of one method in one place. ``less_mixup``, ``less_update_bn`` and ``less_authors`` are mean differences of what stands before
    them, paired by seed, and ``..._error`` their standard errors. Errors and ECE are in percent and points."""

    data_set: str
    network: str
    alpha: float
    budget: str
    method: str
    fraction: float
    gamma: float
    eta: float
    epochs: int
    seeds: int
    cost: float
    error: float
    error_less_mixup: float
    error_less_mixup_error: float
    error_less_update_bn: float | None
    error_less_update_bn_error: float | None
    error_less_authors: float | None
    error_less_authors_error: float | None
    nll: float
    nll_less_mixup: float
    nll_less_mixup_error: float
    ece: float
    ece_less_mixup: float
    ece_less_mixup_error: float
    scaled_nll: float
    scaled_nll_less_mixup: float
    scaled_nll_less_mixup_error: float
    q_hat: float
    first_variance: float


class Difference(NamedTuple):
    """Mean of paired differences and its standard error."""

    mean: float
    error: float


def _fraction(value: float) -> str:
    return str(Fraction(value).limit_denominator(100))


def label(method: Method) -> str:
    """A method's name in tables and pictures."""
    plain = {ERM: "ERM", MIXUP: "Mixup", UPDATE_BN: "Mixup + update_bn", CHOSEN: "1/4 split, (γ, η) by validation"}
    if method in plain:
        return plain[method]
    eta = "" if method.eta == AUTHORS.eta else f", η = {method.eta:g}"
    if method == Method("joint", 1.0, 1.0, 0.0):
        return "RegMixup"
    if method.name == "two calls":
        return f"authors' two calls{eta}"
    return f"{_fraction(method.fraction)} {method.name}, γ = {_fraction(method.gamma)}{eta}"


def paired(ours: dict[int, Run], base: dict[int, Run], figure: Callable[[Run], float]) -> Difference:
    differences = [figure(ours[seed]) - figure(base[seed]) for seed in sorted(ours.keys() & base.keys())]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return Difference(statistics.mean(differences), error)


def choose(candidates: list[dict[int, Run]]) -> dict[int, Run]:
    """For each seed the run with the least validation error, and of those the one with the least validation NLL."""
    seeds = set.intersection(*(set(runs) for runs in candidates))
    return {
        seed: min((runs[seed] for runs in candidates), key=lambda run: (run.validation_error, run.validation_nll))
        for seed in seeds
    }


def _row(where: tuple, method: Method, cost: float, found: dict[Method, dict[int, Run]]) -> Summary:
    runs = found[method]
    values = runs.values()

    def mean(name: str) -> float:
        return statistics.mean(getattr(run, name) for run in values)

    def less(base: Method, name: str = "test_error") -> tuple[float | None, float | None]:
        return paired(runs, found[base], lambda run: getattr(run, name)) if base in found else (None, None)

    calibration = [figure for name in ("nll", "ece", "scaled_nll") for figure in (mean(name), *less(MIXUP, name))]
    epochs = max(run.epochs for run in values)
    return Summary(
        *where, *method, epochs, len(runs), cost, mean("test_error"), *less(MIXUP), *less(UPDATE_BN), *less(AUTHORS),
        *calibration, mean("q_hat"), mean("first_variance"),
    )  # fmt: skip


def summarise(runs: list[Run], costs: list[Cost]) -> list[Summary]:
    """One summary for each place, α, budget and method that has runs there, as far as Mixup has been trained too."""
    by_cell: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        cell, seed = key_of(run)
        by_cell.setdefault(cell, {})[seed] = run
    methods = list(dict.fromkeys(cell.method for cell in by_cell))
    places = dict.fromkeys((run.data_set, run.network, run.alpha) for run in runs if run.alpha)
    summaries = []
    for (data_set, network, alpha), budget in itertools.product(places, (EPOCHS, TIME)):
        full = max(cell.epochs for cell in by_cell if cell[:4] == (data_set, network, alpha, MIXUP))
        found, cost = {}, {}
        for method in methods:
            cost[method] = cost_of(costs, data_set, network, method)
            epochs = full
            if budget == TIME and method not in (MIXUP, UPDATE_BN):
                epochs = epochs_at_equal_time(full, cost[method])
            cell = (data_set, network, alpha_of(alpha, method), method, epochs)
            if cell in by_cell:
                found[method] = by_cell[cell]
        candidates = [runs for method, runs in found.items() if method[:2] == RECIPE[:2]]
        if budget == EPOCHS and len(candidates) > 2:
            cost[CHOSEN], found[CHOSEN] = cost[RECIPE], choose(candidates)
        where = (data_set, network, alpha, budget)
        summaries += [_row(where, method, cost[method], found) for method in found]
    return summaries


def method_of(row: Summary) -> Method:
    return Method(row.method, row.fraction, row.gamma, row.eta)


def plus_minus(mean: float | None, error: float | None, digits: int = 2) -> str:
    return "" if mean is None else f"{mean:+.{digits}f} ± {error:.{digits}f}"


def verdict(mean: float | None, error: float | None) -> str:
    """Less error by more than two standard errors is better, more by as much worse."""
    if mean is None:
        return "not run"
    return "better" if mean < -2 * error else "worse" if mean > 2 * error else "level"


def _methods_table(rows: list[Summary], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    headers = (
        "",
        "step",
        "error %",
        "less Mixup",
        "less authors'",
        "NLL, scaled",
        "ECE",
        "at equal time",
        "less authors'",
    )
    for header in headers:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    by = {(method_of(row), row.budget): row for row in rows}
    for method in SHOWN:
        row, timed = by.get((method, EPOCHS)), by.get((method, TIME))
        if row is None:
            continue
        after = ["", ""] if timed is None else _differences(timed)
        table.add_row(
            label(method), f"{row.cost:.2f}×", f"{row.error:.2f}", *_differences(row),
            f"{row.nll:.3f}, {row.scaled_nll:.3f}", f"{row.ece:.1f}", *after,
            style="bold" if method == RECIPE else None,
        )  # fmt: skip
    return table


def _differences(row: Summary) -> list[str]:
    return [plus_minus(*_mixup(row)), plus_minus(*_authors(row))]


def grid_rows(rows: list[Summary]) -> list[list[str]]:
    """Error less Mixup's of every form, fraction and γ, a column an η."""
    by = {method_of(row): row for row in rows}
    lines = []
    for name, fraction, gamma in dict.fromkeys(
        method[:3] for method in by if method.fraction and method.name != "chosen"
    ):
        cells = [by.get(Method(name, fraction, gamma, eta)) for eta in ETAS]
        if sum(cell is not None for cell in cells) > 1:
            form = name if name == "two calls" else f"{_fraction(fraction)} {name}, γ = {_fraction(gamma)}"
            lines.append(
                [form] + ["" if c is None else plus_minus(c.error_less_mixup, c.error_less_mixup_error) for c in cells]
            )
    return lines


def show(console: Console, summaries: list[Summary]) -> None:
    """A table of the main methods for each place and α, then the grids."""
    for place, group in itertools.groupby(summaries, key=lambda row: (row.data_set, row.network, row.alpha)):
        rows = list(group)
        console.print(_methods_table(rows, "{}, {}, α = {:g}".format(*place)))
        lines = grid_rows([row for row in rows if row.budget == EPOCHS])
        if lines:
            table = Table(
                "", *(f"η = {eta:g}" for eta in ETAS), title="test error less Mixup's, points", box=box.SIMPLE
            )
            for line in lines:
                table.add_row(*line)
            console.print(table)
    console.print(
        "step: CPU time over Mixup's. Differences are paired by seed, ± one standard error. scaled: NLL with the "
        "temperature of the validation rows. At equal time: less Mixup's error, and less the authors'.",
        soft_wrap=True,
    )
    for bar in bars(summaries):
        said = "[green]met[/]" if bar.met else f"[red]not met[/]: {bar.not_at}"
        console.print(f"{bar.what}: {said}", soft_wrap=True)


@dataclasses.dataclass
class Bar:
    """What the recipe should do, and the places where it does not."""

    what: str
    met: bool
    not_at: str


def bars(summaries: list[Summary]) -> list[Bar]:
    """The recipe against its bars, over every place that was run; the last is of the small CNN at α = 1."""
    rows = [row for row in summaries if method_of(row) == RECIPE]
    by_epochs = [row for row in rows if row.budget == EPOCHS]

    def bar(what: str, rows: list[Summary], met: Callable[[Summary], bool]) -> Bar:
        failed = [f"{row.data_set}, {row.network}, α = {row.alpha:g}" for row in rows if not met(row)]
        return Bar(what, not failed, "; ".join(failed))

    found = [bar(f"a step at most {TARGET_RATIO} × Mixup's", by_epochs, lambda row: row.cost <= TARGET_RATIO)]
    for budget in (EPOCHS, TIME):
        at = [row for row in rows if row.budget == budget]
        found.append(bar(f"not worse than Mixup, equal {budget}", at, lambda row: verdict(*_mixup(row)) != "worse"))
        found.append(
            bar(f"not worse than the two calls, equal {budget}", at, lambda row: verdict(*_authors(row)) != "worse")
        )
    at = [row for row in by_epochs if row.alpha == 1]
    found.append(
        bar("running variance of the first BatchNorm that of clean rows within 2 %, α = 1, equal epochs", at,
            lambda row: abs(row.first_variance - 1) <= 0.02)
    )  # fmt: skip
    small = next(iter(NETWORKS))
    strong = [row for row in by_epochs if (row.network, row.alpha) == (small, 1.0) and row.data_set != "digits"]
    what = "better than Mixup by three standard errors, small CNN on MNIST-1D and MNIST 5000, α = 1, equal epochs"
    return [*found, bar(what, strong, lambda row: row.error_less_mixup < -3 * row.error_less_mixup_error)]


def _mixup(row: Summary) -> tuple[float, float]:
    return row.error_less_mixup, row.error_less_mixup_error


def _authors(row: Summary) -> tuple[float | None, float | None]:
    return row.error_less_authors, row.error_less_authors_error
