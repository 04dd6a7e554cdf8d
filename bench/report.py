"""``python -m bench report``: copy the figures of bench/results into the README, between its ``<!-- results: NAME -->`` marks."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _machine(path: Path) -> str:
    facts = json.loads(path.read_text())["machine"]
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}"


def cpu() -> list[str]:
    """Speedups of the whole call against each contender, with the bar each has to clear."""
    rows = _read(RESULTS / "cpu" / "bars.csv")
    if not rows:
        return ["Not measured yet."]
    body = []
    for row in rows:
        measured = "unmeasured" if not row["measured"] else f"{float(row['measured']):.2f} ×"
        met = {"True": "met", "False": "**not met**"}.get(row["met"], "–")
        body.append([row["case"], row["against"], measured, f"{float(row['bar']):g} ×", met])
    machine = _machine(RESULTS / "cpu" / "results.json")
    note = f"Their time over ours, medians of interleaved rounds; {machine}. Picture: `bench/results/cpu/`."
    return [note, "", *_table(["case", "against", "measured", "bar", ""], body)]


def step() -> list[str]:
    """A training step's time over eager mixup's, per model and method."""
    rows = [row for row in _read(RESULTS / "step" / "rows.csv") if row["mode"] == "eager"]
    if not rows:
        return ["The cost of a whole step is not measured yet (`python -m bench step`)."]
    names = list(dict.fromkeys(row["model"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    of = {(row["model"], row["method"]): row for row in rows}
    body = []
    for method in methods:
        cells = []
        for name in names:
            row = of.get((name, method))
            if row is None:
                cells.append("–")
                continue
            spread = f"({float(row['ratio_low']):.2f}–{float(row['ratio_high']):.2f})"
            met = "" if row["target_met"] == "True" else " ✗"
            cells.append(f"{float(row['ratio']):.2f} {spread}{met}")
        body.append([method, *cells])
    machine = _machine(RESULTS / "step" / "results.json")
    note = (
        f"Time of a whole training step over that of eager mixup (median of paired ratios, quartiles); ✗ marks what misses the 1.3 × target. "
        f"{machine}; `python -m bench step`."
    )
    return [note, "", *_table(["method", *names], body)]


def quality() -> list[str]:
    """Test error of each policy at equal epochs and at equal time, per data set."""
    rows = _read(RESULTS / "quality" / "summary.csv")
    if not rows:
        return ["Not measured yet."]
    return [",".join(rows[0])]


SECTIONS: dict[str, Callable[[], list[str]]] = {"cpu": cpu, "step": step, "quality": quality}


def updated(readme: str) -> str:
    """``readme`` with every section's figures as they are in bench/results now."""
    for name, section in SECTIONS.items():
        mark = f"<!-- results: {name} -->\n"
        text = mark + "\n".join(section()) + "\n<!-- end -->"
        readme = re.sub(re.escape(mark) + r".*?<!-- end -->", lambda _, text=text: text, readme, flags=re.DOTALL)
    return readme


def main(arguments: list[str]) -> int:
    if arguments:
        print(__doc__)
        return 2
    README.write_text(updated(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
