"""The picture of ``python -m bench step``, drawn from its CSV file alone."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .methods import TARGET_RATIO
from .results import read_text

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
    rows = read_text(rows_csv)
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
