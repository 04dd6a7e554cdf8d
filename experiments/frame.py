"""What every experiment shares: cells that are computed once and resumed, rows as CSV, one table, one picture.

A module of an experiment has ``cells(options)``, the names of its parts, none twice; ``run(cell, options)``, the rows of one;
``table(rows)``, headers and lines; and ``draw(rows, figure)``. A row is a flat dict, with the same keys in all rows. In a file it has
its cell and the settings that it was computed with, so that rows of other settings are not taken for done.
"""

import csv
import dataclasses
import statistics
import sys
import types
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
DIGITS = 6

Row = dict[str, str | int | float]


@dataclasses.dataclass(frozen=True)
class Options:
    """``quick`` is for tests: tiny data, few steps. ``full`` is the paper's size. ``data`` is a folder of real sets.

    ``epochs`` is instead of an experiment's own number; networks are trained on ``device``.
    """

    quick: bool = False
    full: bool = False
    seeds: int = 8
    data: Path | None = None
    device: torch.device = torch.device("cpu")
    epochs: int | None = None

    def pick(self, quick, normal, full=None):
        """The value for the size of this run; ``full`` is ``normal`` where it is not given."""
        return quick if self.quick else full if self.full and full is not None else normal

    def length(self, quick: int, normal: int, full: int | None = None) -> int:
        """How many epochs to train for: ``pick``, unless ``epochs`` says it."""
        return self.epochs or self.pick(quick, normal, full)

    @property
    def settings(self) -> str:
        """What the rows of a run depend on, in a word; a folder counts by what it holds, not by where it is."""
        words = ["quick"] * self.quick + ["full"] * self.full + [f"seeds={self.seeds}"]
        words += [f"epochs={self.epochs}"] * bool(self.epochs)
        words += [f"device={self.device.type}"] * (self.device.type != "cpu")  # whose random numbers are others
        if self.data:
            held = sorted(path for path in self.data.iterdir() if not path.name.startswith("."))
            listed = "\n".join(f"{path.name} {path.stat().st_size if path.is_file() else 'folder'}" for path in held)
            words.append(f"data={zlib.crc32(listed.encode()):08x}")
        return " ".join(words)


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of random numbers on ``device``, where they are drawn: the host sends none."""
    return torch.Generator(device).manual_seed(seed)


class Lines(NamedTuple):
    """A table: its headers, its lines of text, and what is to be said below it."""

    headers: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""


def _parse(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            {name: text if name == "cell" else _parse(text) for name, text in line.items()}
            for line in csv.DictReader(file)
        ]


def _text(value: str | int | float) -> str:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows of one cell, all at once, to the file; the first rows give it its columns, and others raise ValueError."""
    fresh = not path.exists()
    columns = list(rows[0]) if fresh else next(csv.reader(path.open(newline="")))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def compute(
    module: types.ModuleType, options: Options, store: Path, console: Console, name: str = "", only: str = ""
) -> list[Row]:
    """Run the cells that have ``only`` in their names, but for those that ``store`` holds with these settings.

    Returns the rows of all of the experiment's cells that are there.
    """
    names, settings = [str(cell) for cell in module.cells(options)], options.settings
    asked = [cell for cell in names if only in cell]
    done = {row["cell"] for row in select(read(store), settings=settings)} if store.exists() else set()
    columns = (TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=len(asked))
        for cell in asked:
            if cell not in done:
                progress.update(task, description=f"{name}: {cell}")
                append(store, [{"cell": cell, "settings": settings, **row} for row in module.run(cell, options)])
            progress.advance(task)
        progress.update(task, description=f"{name}: done")
    wanted = set(names)
    return [row for row in select(read(store), settings=settings) if row["cell"] in wanted]


def place(name: str, options: Options) -> Path:
    """The folder for rows and picture: RESULTS, unless its rows are of other settings, or the run is a quick one."""
    committed = RESULTS / f"{name}.csv"
    settled = not committed.exists() or all(row["settings"] == options.settings for row in read(committed))
    return RESULTS if settled and not options.quick else Path("run/experiments")


def show(lines: Lines, title: str, console: Console) -> None:
    table = Table(*lines.headers, title=title, box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines.lines:
        table.add_row(*line)
    console.print(table)
    if lines.note:
        console.print(lines.note, highlight=False)


def picture(module: types.ModuleType, rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    ):
        figure = plt.figure(layout="constrained", dpi=110)
        module.draw(rows, figure)
        figure.savefig(path)
        plt.close(figure)


def execute(
    module: types.ModuleType, name: str, title: str, options: Options, out: Path, fresh: bool = False, only: str = ""
) -> None:
    """Compute what is missing, then print the table and draw the picture, once all rows are there."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    store = out / f"{name}.csv"
    if fresh:
        store.unlink(missing_ok=True)
    with torch.random.fork_rng(devices=[]):
        rows = compute(module, options, store, console, name, only)
    if missing := len(module.cells(options)) - len(distinct(rows, "cell")):
        console.print(f"{missing} cells are left to be run before a table and a picture. Rows: {store}", soft_wrap=True)
        return
    show(module.table(rows), title, console)
    picture(module, rows, out / f"{name}.png")
    console.print(f"Rows and picture: {store}, {out / f'{name}.png'}", soft_wrap=True, highlight=False)


def select(rows: Iterable[Row], /, **where) -> list[Row]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def column(rows: Iterable[Row], name: str, /, **where) -> list[float]:
    """A column of the selected rows, by seed if they have one, so that two of them are paired."""
    chosen = select(rows, **where)
    if chosen and "seed" in chosen[0]:
        chosen.sort(key=lambda row: row["seed"])
    return [float(row[name]) for row in chosen]


def distinct(rows: Iterable[Row], name: str) -> list:
    """The values of a column, in the order in which they come."""
    return list(dict.fromkeys(row[name] for row in rows))


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error); the error of a single value is 0."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """(mean difference, its standard error) of two columns of the same seeds."""
    return mean_error([a - b for a, b in zip(values, others, strict=True)])


def pm(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± standard error``."""
    mean, error = mean_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def difference(values: Sequence[float], others: Sequence[float], digits: int = 2) -> str:
    mean, error = paired(values, others)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"
