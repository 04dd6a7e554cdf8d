"""Result files: rows and bars as CSV, everything with the machine's facts as JSON, and the table that ends a run."""

import csv
import dataclasses
import datetime
import importlib.util
import json
import platform
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch

from .cases import AT_MOST, COPY_RATE, READ_RATE, Row, Verdict

RESULTS = Path(__file__).parent / "results"
Record = TypeVar("Record", Row, Verdict)


def machine_facts() -> dict[str, object]:
    """What the figures were measured on: processor, threads, SIMD level, versions, date."""
    return {
        "device": cpu_model(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_csv(path: Path, records: Iterable[Record], kind: type[Record]) -> None:
    """One line a record, a column a field; None is an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(kind)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, records))


def append_csv(path: Path, record: Record, kind: type[Record]) -> None:
    """One more line of what ``write_csv`` wrote, or the first."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(kind)])
        if fresh:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(record))


def read_text(path: Path) -> list[dict[str, str]]:
    """The cells of each line by the name of their column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_csv(path: Path, kind: type[Record]) -> list[Record]:
    """What ``write_csv`` wrote."""
    hints = typing.get_type_hints(kind)
    return [kind(**{name: _parse(text, hints[name]) for name, text in line.items()}) for line in read_text(path)]


def _parse(text: str, hint: type) -> object:
    if isinstance(hint, types.UnionType):
        if not text:
            return None
        hint = next(option for option in hint.__args__ if option is not types.NoneType)
    return text == "True" if hint is bool else hint(text)


def write(directory: Path, facts: dict[str, object], rows: list[Row], verdicts: list[Verdict]) -> None:
    """rows.csv, bars.csv and results.json under ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    write_csv(directory / "rows.csv", rows, Row)
    write_csv(directory / "bars.csv", verdicts, Verdict)
    everything = {
        "machine": facts,
        "rows": list(map(dataclasses.asdict, rows)),
        "bars": list(map(dataclasses.asdict, verdicts)),
    }
    (directory / "results.json").write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")


def bar_text(verdict: Verdict) -> str:
    """What a bar asks for, in words."""
    if verdict.against in AT_MOST:
        return f"{verdict.against} ≤ {verdict.bar:g}"
    if verdict.against in (COPY_RATE, READ_RATE):
        return f"≥ {verdict.bar:.0%} of the {verdict.against}"
    return f"≥ {verdict.bar:.3g}× {verdict.against}"


def _measured_text(verdict: Verdict) -> str:
    if verdict.measured is None:
        return "-"
    if verdict.against in (COPY_RATE, READ_RATE):
        return f"{verdict.measured:.0%}"
    return f"{verdict.measured:.3g}" + ("" if verdict.against in AT_MOST else "×")


def print_table(title: str, verdicts: list[Verdict]) -> None:
    """A line a bar: what was asked, what was measured, whether it was met."""
    said = {True: "met", False: "not met", None: "not measured"}
    lines = [(v.case, bar_text(v), _measured_text(v), said[v.met]) for v in verdicts]
    header = ("case", "bar", "measured", "")
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, title=title)
        for line in lines:
            colour = {"met": "green", "not met": "red"}.get(line[-1])
            table.add_row(*line, style=colour)
        Console(width=110).print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print(title)
    for line in (header, *lines):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
