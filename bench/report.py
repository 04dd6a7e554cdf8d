"""``python -m bench report``: copy the figures of bench/results into README and docs, between their ``<!-- results: NAME -->`` marks."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import aot_table, host, results
from .cases import AT_MOST, ENQUEUE
from .methods import POLICIES, TABULAR
from .results import RESULTS

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))


def _read(path: Path) -> list[dict[str, str]]:
    return results.read_text(path) if path.exists() else []


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _machine(path: Path) -> str:
    facts = json.loads(path.read_text())
    facts = facts.get("machine", facts)
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}"


def _unit(against: str) -> str:
    return "µs" if against == ENQUEUE else "×"


def _measured(row: dict[str, str] | None) -> str:
    if row is None or not row["measured"]:
        return "unmeasured"
    measured = f"{float(row['measured']):.{1 if row['against'] == ENQUEUE else 2}f} {_unit(row['against'])}"
    return measured if row["met"] == "True" else f"**{measured}**"


def cpu() -> list[str]:
    """Speedups of the whole call against each contender, with the bar each has to clear: a column for each machine.

    The newest run is in results/cpu; a folder results/cpu-NAME keeps another machine's.
    """
    folders = [path.parent for path in sorted(RESULTS.glob("cpu*/bars.csv"))]
    if not folders:
        return ["Not measured yet."]
    machines = [{(row["case"], row["against"]): row for row in _read(folder / "bars.csv")} for folder in folders]
    body = []
    for (case, against), row in machines[0].items():
        cells = [_measured(machine.get((case, against))) for machine in machines]
        bar = f"{'at most ' if against in AT_MOST else ''}{float(row['bar']):.3g} {_unit(against)}"
        body.append([case, against, bar, *cells])
    names = [_machine(folder / "results.json") for folder in folders]
    note = (
        "Their time over ours, medians of interleaved rounds; a figure in bold misses its bar. Machines: "
        f"{'; '.join(names)}. Pictures: {', '.join(f'`bench/results/{folder.name}/`' for folder in folders)}."
    )
    return [note, "", *_table(["case", "against", "bar", *(name.split(",")[0] for name in names)], body)]


def host_share() -> list[str]:
    """What the host does for a loss on a device, in parts."""
    rows = [row for row in _read(RESULTS / "cpu" / "rows.csv") if row["case"] == host.CASE and row["enqueue_seconds"]]
    if not rows:
        return ["Not measured yet."]
    body = [[row["provider"], f"{1e6 * float(row['enqueue_seconds']):.1f}"] for row in rows]
    note = f"{_machine(RESULTS / 'cpu' / 'results.json')}; one of the threads; `python -m bench cpu`."
    return [note, "", *_table([host.CASE, "µs"], body)]


def aot() -> list[str]:
    """What is counted in the kernels' machine code."""
    head = ["sm_90, bfloat16 but where another dtype is named", "Triton", "CUDA C++", "bar of the loop"]
    return _table(head, aot_table.summary(RESULTS / "aot.csv"))


def _methods_table(rows: list[dict[str, str]]) -> list[str]:
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
            met = "" if row["target_met"] == "True" else " ✗"
            cells.append(
                f"{float(row['ratio']):.2f} ({float(row['ratio_low']):.2f}–{float(row['ratio_high']):.2f}){met}"
            )
        body.append([method, *cells])
    return _table(["", *names], body)


def step() -> list[str]:
    """A training step's time over eager mixup's, per model and method."""
    rows = [row for row in _read(RESULTS / "step-cpu" / "rows.csv") if row["mode"] == "eager"]
    if not rows:
        return ["The cost of a whole step is not measured yet (`python -m bench step`)."]
    note = (
        "Time of a whole training step over that of eager, timm-style mixup on a CPU: median of paired ratios and "
        f"quartiles; ✗ misses the 1.3 × target. {_machine(RESULTS / 'step-cpu' / 'facts.json')}; `python -m bench step`."
    )
    return [note, "", *_methods_table(rows), "", _mixup_beside_eager(rows)]


def _mixup_beside_eager(rows: list[dict[str, str]]) -> str:
    """Plain mixup's steps with their standard errors, and the part of them that is not the model's."""
    ours, eager = ([row for row in rows if row["method"] == name] for name in ("Mixup", "Mixup eager"))
    cells = [
        f"{mine['model'].split()[0]} {float(mine['ratio']):.3f} ± {float(mine['ratio_error']):.3f} "
        f"({1e3 * float(mine['own_seconds']):.2f} ms against {1e3 * float(theirs['own_seconds']):.2f})"
        for mine, theirs in zip(ours, eager, strict=True)
    ]
    return (
        "`mk.Mixup` beside eager mixup, by several turns in each round: median ± its standard error, and in brackets what "
        f"the batch and the loss take of a step, all in which the two differ: {', '.join(cells)}."
    )


def _errors(rows: list[dict[str, str]], budget: str) -> list[str]:
    of = {(row["data_set"], row["policy"]): row for row in rows if row["budget"] == budget}
    body = []
    for name in dict.fromkeys(data_set for data_set, _ in of):
        cells = []
        for policy in TABULAR:
            row = of[name, policy]
            paper = f" [{row['paper']}]" if row["paper"] else ""
            cells.append(f"{float(row['error']):.2f} ± {float(row['error_std']):.2f}{paper}")
        body.append([name, *cells, *([_best(of, name)] if budget == "time" else [])])
    last = ["best of the three, less full"] if budget == "time" else []
    return _table(["", *(POLICIES[name].label.removeprefix("MixupE ") for name in TABULAR), *last], body)


def _best(of: dict[tuple[str, str], dict[str, str]], name: str) -> str:
    """The cheap policy with the least error against full: difference ± standard error, paired by seed."""
    row = min((of[name, policy] for policy in ("sample", "split", "mixed")), key=lambda row: float(row["error"]))
    difference, error = float(row["difference"]), float(row["difference_error"])
    verdict = "" if difference <= error else " **worse**"
    return f"{row['policy']}: {difference:+.2f} ± {error:.2f}{verdict}"


def quality() -> list[str]:
    """Test error of each policy at equal epochs and at equal time, per data set."""
    rows = [row for row in _read(TRAINED / "quality" / "summary.csv") if float(row["corrupted"]) == 0]
    rows = [row for row in rows if row["policy"] in TABULAR]
    if not rows:
        return ["Not measured yet."]
    return [
        "Test error in percent, mean ± standard deviation of five seeds, by the protocol of the paper's Table 4: its "
        "tabular network, (α, η) chosen on validation rows. Figures in brackets are the paper's. At equal epochs (25):",
        "",
        *_errors(rows, "epochs"),
        "",
        "At equal training time (that of 25 epochs of the full policy); **worse** would mark a best cheap policy that is "
        "worse than full by more than one standard error:",
        "",
        *_errors(rows, "time"),
        "",
        "Pictures, corrupted labels and adversarial inputs: `experiments/results/quality/`.",
    ]


IMAGES = TRAINED / "quality-images"
# (method, fraction, γ, η) → a column of the table on networks with BatchNorm.
RECIPE, AUTHORS = ("split", 0.25, 0.25, 0.001), ("two calls", 1.0, 0.0, 0.001)
IMAGE_COLUMNS = {
    ("erm", 0.0, 0.0, 0.0): "ERM",
    ("update_bn", 0.0, 0.0, 0.0): "Mixup + update_bn",
    AUTHORS: "two calls",
    ("joint", 1.0, 1.0, 0.0): "RegMixup",
    ("joint", 0.125, 0.0, 0.001): "1/8 joint, γ = 0",
    ("split", 0.25, 1.0, 0.001): "1/4 split, γ = 1",
    RECIPE: "**1/4 split, γ = 1/4**",
}
Places = dict[tuple[str, str, str], dict[tuple, dict[str, str]]]


def _places(rows: list[dict[str, str]], budget: str) -> Places:
    """(set, network, α) → method → row, of one budget."""
    places: Places = {}
    for row in rows:
        if row["budget"] == budget:
            method = (row["method"], *(float(row[key]) for key in ("fraction", "gamma", "eta")))
            places.setdefault((row["data_set"], row["network"], row["alpha"]), {})[method] = row
    return places


def _place(place: tuple[str, str, str]) -> str:
    return f"{place[0]}, {place[1]}, α = {float(place[2]):g}"


def _less(row: dict[str, str] | None, figure: str = "error_less_mixup", digits: int = 2) -> str:
    """A paired difference with its standard error, in bold where it is worse by more than two of them."""
    if row is None or not row[figure]:
        return "–"
    mean, error = float(row[figure]), float(row[f"{figure}_error"])
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if mean > 2 * error else text


def _images_errors(rows: list[dict[str, str]]) -> list[str]:
    body = []
    for place, methods in _places(rows, "epochs").items():
        mixup = float(methods["mixup", 0.0, 0.0, 0.0]["error"])
        body.append([_place(place), f"{mixup:.2f}", *(_less(methods.get(key)) for key in IMAGE_COLUMNS)])
    return _table(["", "Mixup", *IMAGE_COLUMNS.values()], body)


def _images_recipe(rows: list[dict[str, str]]) -> list[str]:
    """The recipe against the authors' form, at equal time against both, and what the two cost."""
    costs = {
        (row["data_set"], row["network"], row["method"], float(row["fraction"])): row
        for row in _read(IMAGES / "costs.csv")
    }
    timed, body = _places(rows, "time"), []
    for place, methods in _places(rows, "epochs").items():
        if RECIPE not in methods:
            continue
        step = [costs[(*place[:2], *method[:2])] for method in (RECIPE, AUTHORS)]
        cells = [f"{float(row['median']):.2f} ({float(row['low']):.2f}–{float(row['high']):.2f})" for row in step]
        late = timed.get(place, {}).get(RECIPE)
        less = [_less(methods[RECIPE], f"error_less_{base}") for base in ("update_bn", "authors")]
        body.append([_place(place), *cells, *less, _less(late), _less(late, "error_less_authors")])
    head = ["the recipe", "step", "step of the two calls", "less Mixup + update_bn", "less the two calls",
            "equal time: less Mixup", "equal time: less the two calls"]  # fmt: skip
    return _table(head, body)


def _images_calibration(rows: list[dict[str, str]]) -> list[str]:
    keys = {("mixup", 0.0, 0.0, 0.0): "Mixup", **IMAGE_COLUMNS}
    body = []
    for place, methods in _places(rows, "epochs").items():
        cells = [
            f"{float(row['ece']):.1f}, {float(row['scaled_nll']):.3f}" if (row := methods.get(key)) else "–"
            for key in keys
        ]
        body.append([_place(place), *cells])
    return _table(["ECE, scaled NLL", *keys.values()], body)


def _images_eta(rows: list[dict[str, str]]) -> list[str]:
    """What R does: error and ECE of 1/4 split less Mixup's at each η, one row a set and γ."""
    etas, body = (0.0, 0.001, 0.1, 1.0), []
    for place, methods in _places(rows, "epochs").items():
        for gamma in (0.0, 0.25, 1.0):
            found = [methods.get(("split", 0.25, gamma, eta)) for eta in etas]
            if None not in found:
                cells = [f"{_less(row)}; {_less(row, 'ece_less_mixup', 1)}" for row in found]
                body.append([f"{_place(place)}, γ = {gamma:g}", *cells])
    return _table(["error; ECE", *(f"η = {eta:g}" for eta in etas)], body)


def _images_count(rows: list[dict[str, str]], budget: str, base: str) -> str:
    """In how many places the recipe has less error than ``base`` by more than two standard errors, or more, or neither."""
    better = worse = level = 0
    for methods in _places(rows, budget).values():
        row = methods.get(RECIPE)
        if row is not None and row[f"error_less_{base}"]:
            mean, error = float(row[f"error_less_{base}"]), float(row[f"error_less_{base}_error"])
            better, worse, level = (
                better + (mean < -2 * error),
                worse + (mean > 2 * error),
                level + (abs(mean) <= 2 * error),
            )
    return f"{better} better, {level} level, {worse} worse"


def _images_counts(rows: list[dict[str, str]]) -> list[str]:
    names = {"mixup": "Mixup", "update_bn": "Mixup + update_bn", "authors": "the authors' two calls"}
    body = [[f"against {name}", *(_images_count(rows, budget, base) for budget in ("epochs", "time"))]
            for base, name in names.items()]  # fmt: skip
    return _table(["the recipe, number of places", "equal epochs", "equal time"], body)


def _images_bars() -> list[str]:
    body = [[row["what"], "met" if row["met"] == "True" else "**not met**", row["not_at"] or "–"]
            for row in _read(IMAGES / "bars.csv")]  # fmt: skip
    return _table(["1/4 split, γ = 1/4", "", "not at"], body)


def images() -> list[str]:
    """Networks with BatchNorm: every way to use the clean rows, less plain Mixup."""
    rows = _read(IMAGES / "summary.csv")
    if not rows:
        return ["Not measured yet."]
    seeds = {row["seeds"] for row in rows}
    return [
        f"Test error of Mixup in percent, and of the others less Mixup's, in points: mean ± standard error of {max(seeds)} seeds, "
        "paired, at equal epochs. **Bold** is worse by more than two standard errors. η = 1e-3, but 0 for RegMixup.",
        "",
        *_images_errors(rows),
        "",
        "The recipe, 1/4 split with γ = 1/4: CPU time of a step over Mixup's (quartiles), and its error less that of Mixup with "
        "update_bn and of the authors' two calls; then at equal time, as many epochs as Mixup's training lasts:",
        "",
        *_images_recipe(rows),
        "",
        "Better and worse are so by more than two standard errors:",
        "",
        *_images_counts(rows),
        "",
        *_images_bars(),
        "",
        "Calibration: expected calibration error in points, and NLL with the temperature that validation rows ask for:",
        "",
        *_images_calibration(rows),
        "",
        "What R adds to the same clean rows, split, by η: error and ECE less Mixup's, in points:",
        "",
        *_images_eta(rows),
    ]


def recipe() -> list[str]:
    """What the recipe costs and gains, in short: for the README."""
    methods = {("erm", 0.0, 0.0, 0.0): "no mixing", AUTHORS: "the authors' two calls", RECIPE: "**the recipe**"}
    body = []
    for place, found in _places(_read(IMAGES / "summary.csv"), "epochs").items():
        rows = [found.get(method) for method in methods]
        cells = [f"{_less(row)}, {float(row['cost']):.2f} ×" if row else "–" for row in rows]
        body.append([_place(place), f"{float(found['mixup', 0.0, 0.0, 0.0]['error']):.2f}", *cells])
    if not body:
        return ["Not measured yet."]
    note = (
        "Small networks with BatchNorm, equal epochs: test error of plain Mixup in percent; of others less Mixup's, in points ± standard "
        "error, paired by seed (bold is worse by more than two); and the time of a step over Mixup's on a CPU."
    )
    return [note, "", *_table(["", "Mixup", *methods.values()], body)]


def ranks() -> list[str]:
    """What a call adds to a step on many GPUs, by the model of ``bench ranks``; and what was counted under gloo."""
    counts, costs = _read(RESULTS / "ranks" / "counts.csv"), _read(RESULTS / "ranks" / "costs.csv")
    if not counts:
        return ["Not counted yet."]
    body = []
    for call in dict.fromkeys(row["call"] for row in counts):
        seen = {row["ranks"]: row for row in counts if row["call"] == call}
        cost = {(row["ranks"], row["step_seconds"]): row for row in costs if row["call"] == call}
        times = [f"{float(cost[n, '0.1']['seconds']) * 1e6:.0f} µs" for n in ("8", "64", "1024")]
        waited = [f"{float(cost['64', step]['exposed_share']):.2%}" for step in ("0.1", "0.005")]
        sent = [f"{float(seen[n]['messages']):.3g}, {float(seen[n]['bytes']):.0f} B" for n in ("2", "8")]
        body.append([call, *sent, *times, *waited])
    head = [
        "a call",
        "counted, 2 ranks",
        "8 ranks",
        "modelled, 8 GPUs",
        "64",
        "1024",
        "share of 0.1 s at 64",
        "of 5 ms",
    ]
    return _table(head, body)


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "cpu": cpu,
    "host": host_share,
    "aot": aot,
    "step": step,
    "quality": quality,
    "images": images,
    "recipe": recipe,
    "ranks": ranks,
}


def updated(page: str) -> str:
    """``page`` with every section's figures as they are in bench/results now."""
    for name, section in SECTIONS.items():
        mark = f"<!-- results: {name} -->\n"
        text = mark + "\n".join(section()) + "\n<!-- end -->"
        page = re.sub(re.escape(mark) + r".*?<!-- end -->", lambda _, text=text: text, page, flags=re.DOTALL)
    return page


def main(arguments: list[str]) -> int:
    if arguments:
        print(__doc__)
        return 2
    for page in PAGES:
        page.write_text(updated(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
