"""Pictures of the training benchmarks, drawn from their CSV files only."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .methods import POLICIES, TARGET_RATIO

# Okabe and Ito's colours, which the colour-blind can tell apart; one a policy, the same in every picture.
COLOURS = {
    "erm": "#9A9A9A",
    "mixup": "#222222",
    "full": "#D55E00",
    "sample": "#0072B2",
    "split": "#009E73",
    "mixed": "#CC79A7",
}
# Policies that share seeds can coincide for many epochs: dashes let the line below show.
DASHES = {"full": (0, (5, 1.5)), "mixed": (0, (2, 2))}
MARKERS = {"erm": "X", "mixup": "o", "full": "s", "sample": "D", "split": "^", "mixed": "v"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _percent_axis(axis) -> None:
    """Logarithmic, with labels a reader can use at 1, 2, 5, 10, 20, 50."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.set_minor_formatter(NullFormatter())


def _target_band(axes: Axes, right: float) -> None:
    """Green up to the target; ``right`` is where the costs end."""
    axes.axvspan(0, TARGET_RATIO, color="#009E73", alpha=0.07, linewidth=0)
    axes.axvline(TARGET_RATIO, color="#009E73", linewidth=1, linestyle="--")
    axes.set_xlim(0.75, max(right * 1.05, TARGET_RATIO + 0.15))
    axes.text(TARGET_RATIO - 0.01, 0.985, f"target ≤ {TARGET_RATIO}×", color="#00664B", ha="right", va="top",
              transform=axes.get_xaxis_transform(), fontsize=9)  # fmt: skip


def _learning_curves(axes: Axes, rows: list[dict[str, str]]) -> None:
    errors = defaultdict(lambda: defaultdict(list))
    for row in rows:
        errors[row["policy"]][int(row["epoch"])].append(float(row["test_error_percent"]))
    for policy, by_epoch in errors.items():
        epochs = sorted(by_epoch)
        mean = [statistics.mean(by_epoch[epoch]) for epoch in epochs]
        axes.plot(epochs, mean, color=COLOURS[policy], linewidth=1.8, linestyle=DASHES.get(policy, "-"))
    axes.set_yscale("log")
    _percent_axis(axes.yaxis)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test error, mean of seeds")
    axes.set_xlim(1, max(epochs))


def _point(axes: Axes, policy: str, cost: float, error: float, low: float, high: float, error_bar: float) -> None:
    """A policy's marker, above the thin bars of every policy."""
    colour = COLOURS[policy]
    axes.errorbar(cost, error, yerr=error_bar, xerr=[[cost - low], [high - cost]], color=colour, alpha=0.55,
                  linewidth=1.1, linestyle="none")  # fmt: skip
    axes.plot(cost, error, color=colour, marker=MARKERS[policy], markersize=9, markeredgecolor="white",
              linestyle="none", zorder=5, label=POLICIES[policy].label)  # fmt: skip


def demo(curves: Path, summary: Path, picture: Path) -> None:
    """Learning curves, and test error against the cost of a step, one row of panels a data set."""
    curve_rows, summary_rows = read(curves), read(summary)
    names = list(dict.fromkeys(row["data_set"] for row in summary_rows))
    seeds = len({row["seed"] for row in curve_rows})
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(names), 2, figsize=(11, 3.7 * len(names) + 1), squeeze=False)
        for (left, right), name in zip(grid, names, strict=True):
            _learning_curves(left, [row for row in curve_rows if row["data_set"] == name])
            left.set_title(f"{name}: learning curves")
            points = [row for row in summary_rows if row["data_set"] == name]
            for row in points:
                cost, low, high = float(row["cost"]), float(row["cost_low"]), float(row["cost_high"])
                _point(right, row["policy"], cost, float(row["error"]), low, high, float(row["error_std"]) / seeds**0.5)
            _target_band(right, max(float(row["cost_high"]) for row in points))
            right.set_title(f"{name}: error against the cost of a step")
            right.set_xlabel("time of a training step / time of a Mixup step")
            right.set_ylabel("final test error ± standard error, %")
        handles, labels = grid[0][1].get_legend_handles_labels()
        figure.suptitle("MixupE on the paper's tabular network: what each policy costs and what it buys",
                        x=0.01, ha="left", fontsize=13, fontweight="bold")  # fmt: skip
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), handletextpad=0.2, columnspacing=1.4)
        figure.tight_layout(rect=(0, 0.05, 1, 0.99))
        figure.savefig(picture)
        plt.close(figure)


STEP_COLOURS = {"sample": "#0072B2", "split": "#009E73", "mixed": "#CC79A7", "full": "#D55E00", "authors": "#D55E00",
                "interval": "#E69F00", "exact": "#56B4E9"}  # fmt: skip


# Bars end here, with their figure beside them: the exact term would squeeze all others.
LONGEST_BAR = 2.6


def _step_bar(axes: Axes, position: int, row: dict[str, str]) -> None:
    ratio, low, high = (float(row[key]) for key in ("ratio", "ratio_low", "ratio_high"))
    colour = next((colour for key, colour in STEP_COLOURS.items() if key in row["method"]), "#444444")
    length = min(ratio, LONGEST_BAR)
    axes.barh(position, length, color=colour, height=0.62, alpha=0.45 if "authors" in row["method"] else 0.85)
    end = length
    if ratio < LONGEST_BAR:
        end = min(max(ratio, high), LONGEST_BAR)
        axes.plot([low, end], [position, position], color="black", linewidth=1.2)
    if row["prediction"]:
        axes.plot(float(row["prediction"]), position, marker="D", markersize=5, color="white",
                  markeredgecolor="black", linestyle="none")  # fmt: skip
        end = max(end, float(row["prediction"]) + 0.04)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(end + 0.04, position, f"{ratio:.2f}×", va="center", fontsize=9, bbox=white)


def step(rows_csv: Path, picture: Path, machine: str) -> None:
    """A panel a model: each way's step over eager Mixup's as a bar, quartiles as a whisker, 1 + ρu as a diamond."""
    rows = read(rows_csv)
    panels = list(dict.fromkeys((row["model"], row["mode"], row["batch"], row["share"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (2.6 + 3.6 * columns, 0.8 + (1.2 + 0.3 * len(methods)) * lines)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
        for axes, (model, mode, batch, share) in zip(grid.flat, panels, strict=False):
            for row in rows:
                if (row["model"], row["mode"]) == (model, mode):
                    _step_bar(axes, methods.index(row["method"]), row)
            axes.axvline(TARGET_RATIO, color="#00664B", linestyle="--", linewidth=1)
            axes.axvline(1, color="#888888", linewidth=0.8)
            axes.set_xlim(0, LONGEST_BAR + 0.45)
            axes.set_yticks(range(len(methods)), methods)
            axes.set_ylim(len(methods) - 0.5, -0.5)
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{model}\nbatch {batch}, {mode}, u = {float(share):.2f}", fontsize=10)
            axes.set_xlabel("step time / eager Mixup step")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.suptitle("What a training step costs", x=0.01, ha="left", fontsize=13, fontweight="bold")
        note = f"Dashed: the {TARGET_RATIO}× target. Diamond: prediction 1 + ρu. Line: quartiles of the turns' ratios."
        note += f" Bars are cut at {LONGEST_BAR}×."
        figure.text(0.01, 0.012, f"{note}\n{machine}", fontsize=8.5, color="#555555")
        figure.tight_layout(rect=(0, 0.07, 1, 0.99))
        figure.savefig(picture)
        plt.close(figure)


def quality(summary: Path, picture: Path) -> None:
    """A panel a data set: test error at equal time against the cost of a step, one point a policy."""
    rows = [row for row in read(summary) if row["budget"] == "time" and float(row["corrupted"]) == 0]
    runs = read(summary.with_name("runs.csv"))
    names = list(dict.fromkeys(row["data_set"] for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.3 * lines + 1.1), squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            shown = [row for row in rows if row["data_set"] == name]
            seeds = len({run["seed"] for run in runs if run["data_set"] == name})
            for row in shown:
                cost = float(row["cost"])
                _point(axes, row["policy"], cost, float(row["error"]), cost, cost, float(row["error_std"]) / seeds**0.5)
            _target_band(axes, max(float(row["cost"]) for row in shown))
            axes.set_title(name)
            axes.margins(y=0.15)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("test error ± standard error, %")
        for axes in grid[-1]:
            axes.set_xlabel("step time / Mixup step")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.suptitle("Test error at equal training time against the cost of a step", x=0.01, ha="left", fontsize=13,
                        fontweight="bold")  # fmt: skip
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), handletextpad=0.2, columnspacing=1.4)
        figure.tight_layout(rect=(0, 0.06, 1, 0.99))
        figure.savefig(picture)
        plt.close(figure)


def robustness(summary: Path, picture: Path) -> None:
    """Error against the share of corrupted training labels, and under FGSM beside the clean error."""
    rows = [row for row in read(summary) if row["budget"] == "epochs"]
    name = next(row["data_set"] for row in rows if float(row["corrupted"]))
    rows = [row for row in rows if row["data_set"] == name]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.6))
        for policy in POLICIES:
            line = sorted((float(row["corrupted"]), float(row["error"])) for row in rows if row["policy"] == policy)
            left.plot([100 * share for share, _ in line], [error for _, error in line], color=COLOURS[policy],
                      marker=MARKERS[policy], markeredgecolor="white", markersize=8, linewidth=1.6,
                      label=POLICIES[policy].label)  # fmt: skip
        left.set_yscale("log")
        _percent_axis(left.yaxis)
        left.set_xticks([0, 20, 50, 80])
        left.set_xlabel("training labels replaced by noise, %")
        left.set_ylabel("test error")
        left.set_title(f"{name}: corrupted labels")
        left.legend(fontsize=9)
        clean = [row for row in rows if not float(row["corrupted"])]
        labels = [POLICIES[row["policy"]].label if row["policy"] in POLICIES else "ERM + R" for row in clean]
        figures = (("error", "clean", "#444444"), ("fgsm_error", "FGSM 4/255 of the range", "#0072B2"),
                   ("strong_fgsm_error", "FGSM 32/255 of the range", "#D55E00"))  # fmt: skip
        for offset, (key, what, colour) in zip((-0.27, 0, 0.27), figures, strict=True):
            places = [index + offset for index in range(len(clean))]
            right.barh(places, [float(row[key]) for row in clean], height=0.25, color=colour, label=what)
            for place, row in zip(places, clean, strict=True):
                right.text(float(row[key]) + 0.6, place, f"{float(row[key]):.1f}", va="center", fontsize=8)
        right.set_xlim(0, 1.15 * max(float(row["strong_fgsm_error"]) for row in clean))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        right.set_yticks(range(len(clean)), labels)
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.set_xlabel("test error")
        right.set_title(f"{name}: adversarial inputs")
        right.legend(
            fontsize=9, loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=3, columnspacing=1, handlelength=1
        )
        figure.tight_layout()
        figure.savefig(picture)
        plt.close(figure)
