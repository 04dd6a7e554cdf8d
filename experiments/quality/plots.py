"""Pictures of the training benchmarks, drawn from their CSV files only."""

import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.methods import POLICIES, TABULAR, TARGET_RATIO
from bench.results import read_text
from bench.step_plot import STYLE

# Okabe and Ito's colours, which the colour-blind can tell apart; one a policy, the same in every picture.
COLOURS = {
    "erm": "#9A9A9A",
    "mixup": "#222222",
    "full": "#D55E00",
    "sample": "#0072B2",
    "split": "#009E73",
    "mixed": "#CC79A7",
    "authors": "#A5502A",
    "recipe": "#005B41",
}
# Policies that share seeds can coincide for many epochs: dashes let the line below show.
DASHES = {"full": (0, (5, 1.5)), "mixed": (0, (2, 2))}
MARKERS = {"erm": "X", "mixup": "o", "full": "s", "sample": "D", "split": "^", "mixed": "v", "authors": "P",
           "recipe": "*"}  # fmt: skip


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
    size = 14 if policy == "recipe" else 9
    colour = COLOURS[policy]
    axes.errorbar(cost, error, yerr=error_bar, xerr=[[cost - low], [high - cost]], color=colour, alpha=0.55,
                  linewidth=1.1, linestyle="none")  # fmt: skip
    axes.plot(cost, error, color=colour, marker=MARKERS[policy], markersize=size,
              markeredgecolor="white", linestyle="none", zorder=5, label=POLICIES[policy].label)  # fmt: skip


def demo(curves: Path, summary: Path, picture: Path) -> None:
    """Learning curves, and test error against the cost of a step, one row of panels a data set."""
    curve_rows, summary_rows = read_text(curves), read_text(summary)
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
        drawn = [axes.get_legend_handles_labels() for axes in grid[:, 1]]
        handles = {label: handle for panel in drawn for handle, label in zip(*panel, strict=True)}
        figure.suptitle("MixupE: what each policy costs and what it buys",
                        x=0.01, ha="left", fontsize=13, fontweight="bold")  # fmt: skip
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=-(-len(handles) // 2),
                      handletextpad=0.2, columnspacing=1.4)  # fmt: skip
        figure.tight_layout(rect=(0, 0.06, 1, 0.99))
        figure.savefig(picture)
        plt.close(figure)


def quality(summary: Path, picture: Path) -> None:
    """A panel a data set: test error at equal time against the cost of a step, one point a policy."""
    rows = [row for row in read_text(summary) if row["budget"] == "time" and float(row["corrupted"]) == 0]
    runs = read_text(summary.with_name("runs.csv"))
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
    rows = [row for row in read_text(summary) if row["budget"] == "epochs"]
    name = next(row["data_set"] for row in rows if float(row["corrupted"]))
    rows = [row for row in rows if row["data_set"] == name]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.6))
        for policy in TABULAR:
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


# (method, fraction, γ) → how it is drawn: what a reader looks for is large and has the strong colours.
IMAGE_MARKS = {
    ("mixup", 0.0, 0.0): ("Mixup", "#222222", "o", 10),
    ("split", 0.25, 0.25): ("MixupE, 1/4 clean rows, split BatchNorm, γ = 1/4", "#009E73", "*", 18),
    ("two calls", 1.0, 0.0): ("MixupE, the authors' two calls", "#D55E00", "s", 9),
    ("erm", 0.0, 0.0): ("ERM", "#9A9A9A", "X", 9),
    ("update_bn", 0.0, 0.0): ("Mixup, then update_bn", "#222222", "P", 9),
    ("split", 0.25, 1.0): ("1/4 split, γ = 1", "#7FCDB4", "^", 8),
    ("joint", 0.25, 0.25): ("1/4 joint BatchNorm, γ = 1/4", "#56B4E9", "D", 7),
    ("joint", 0.125, 0.0): ("1/8 joint, γ = 0", "#0072B2", "d", 8),
    ("joint", 1.0, 1.0): ("RegMixup", "#CC79A7", "v", 8),
}


def _image_panel(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Error against cost of one set and network; bars are standard errors of the paired difference from Mixup."""
    by = {(row["method"], float(row["fraction"]), float(row["gamma"])): row for row in rows}
    for key, (label, colour, marker, size) in IMAGE_MARKS.items():
        row = by.get(key)
        if row is None:
            continue
        cost, error = float(row["cost"]), float(row["error"])
        axes.errorbar(cost, error, yerr=float(row["error_less_mixup_error"]), color=colour, alpha=0.55, linewidth=1.2,
                      linestyle="none")  # fmt: skip
        axes.plot(cost, error, color=colour, marker=marker, markersize=size, markeredgecolor="white", linestyle="none",
                  zorder=6 if marker == "*" else 5, label=label)  # fmt: skip
    mixup = float(by["mixup", 0.0, 0.0]["error"])
    axes.axhline(mixup, color="#222222", linewidth=0.9, linestyle=":")
    axes.annotate("Mixup's error", (1.34, mixup), ha="left", va="bottom", fontsize=8, color="#444444")
    _target_band(axes, 2.05)
    axes.margins(y=0.16)


def images(summary: Path, alpha: float, picture: Path) -> None:
    """A column of panels a set, a row a network: test error at equal epochs against the cost of a step."""
    rows = [row for row in read_text(summary) if row["budget"] == "epochs" and float(row["alpha"]) == alpha]
    eta = {
        key: 0.0 if key[0] in ("erm", "mixup", "update_bn") or key[1:] == (1.0, 1.0) else 1e-3 for key in IMAGE_MARKS
    }
    rows = [
        row for row in rows
        if eta.get((row["method"], float(row["fraction"]), float(row["gamma"]))) == float(row["eta"])
    ]  # fmt: skip
    sets, networks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("data_set", "network"))
    with plt.rc_context(STYLE):
        size = (4 * len(sets), 3.5 * len(networks) + 1.7)
        figure, grid = plt.subplots(len(networks), len(sets), figsize=size, squeeze=False)
        for line, network in zip(grid, networks, strict=True):
            for axes, data_set in zip(line, sets, strict=True):
                shown = [row for row in rows if (row["data_set"], row["network"]) == (data_set, network)]
                axes.set_visible(bool(shown))
                if shown:
                    _image_panel(axes, shown)
                axes.set_title(f"{data_set}, {network}")
            line[0].set_ylabel("test error, % (lower is better)")
        for axes in grid[-1]:
            axes.set_xlabel("time of a step / Mixup's step")
        seeds = max(int(row["seeds"]) for row in rows)
        figure.suptitle(f"What clean rows buy, and what they cost: networks with BatchNorm, α = {alpha:g}", x=0.01,
                        ha="left", fontsize=13, fontweight="bold")  # fmt: skip
        figure.text(0.01, 0.01, f"Means of {seeds} seeds; bars: standard error of the difference from Mixup, paired by "
                    "seed. Equal epochs.", fontsize=8.5, color="#555555")  # fmt: skip
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 0.03), handletextpad=0.3)
        figure.tight_layout(rect=(0, 0.19 if len(networks) == 1 else 0.13, 1, 0.985))
        figure.savefig(picture)
        plt.close(figure)
