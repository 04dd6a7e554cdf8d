"""Pictures of a run, drawn from its CSV files alone: speedups with the bars to clear, and a roofline."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import results
from .cases import COPY_RATE, READ_RATE, Row, Verdict


def speedups(directory: Path, caption: str) -> Path:
    """Draw speedups.png under ``directory``: a bar for each contender's time over ours, a tick where one is asked for."""
    rows = results.read_csv(directory / "rows.csv", Row)
    bars = {(v.case, v.against): v.bar for v in results.read_csv(directory / "bars.csv", Verdict)}
    shown = [row for row in rows if row.speedup is not None and (row.speedup != 1 or row.speedup_low != 1)]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.26 * max(len(shown), 4)), layout="constrained")
    palette = plt.get_cmap("tab10").colors
    colours = {name: palette[index % 10] for index, name in enumerate(dict.fromkeys(row.provider for row in shown))}
    for position, row in enumerate(shown):
        error = [[row.speedup - row.speedup_low], [row.speedup_high - row.speedup]]
        axes.barh(position, row.speedup, color=colours[row.provider], xerr=error, error_kw={"linewidth": 0.8})
        bar = bars.get((row.case, row.provider))
        if bar is not None:
            axes.plot([bar, bar], [position - 0.45, position + 0.45], color="black", linewidth=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{row.case} vs {row.provider}" for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel("its time over ours (median of paired ratios, quartiles); black tick: bar to clear")
    figure.suptitle(caption, fontsize=8)
    return _save(figure, directory / "speedups.png")


def roofline(directory: Path, caption: str) -> Path:
    """Draw roofline.png under ``directory``: bytes a case must move against the rate reached, under the ceilings."""
    rows = [row for row in results.read_csv(directory / "rows.csv", Row) if row.bytes_per_second]
    ceilings = [row for row in rows if row.provider in (COPY_RATE, READ_RATE)]
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for row, style in zip(ceilings, ("-", "--"), strict=False):
        axes.axhline(row.bytes_per_second / 1e9, color="black", linestyle=style, linewidth=1, label=row.provider)
    points = [row for row in rows if row not in ceilings]
    palette = plt.get_cmap("tab10").colors
    for index, provider in enumerate(dict.fromkeys(row.provider for row in points)):
        own = [row for row in points if row.provider == provider]
        sizes, rates = [row.bytes_moved / 1e6 for row in own], [row.bytes_per_second / 1e9 for row in own]
        axes.scatter(sizes, rates, s=24, color=palette[index % 10], label=provider)
    for size in dict.fromkeys(row.bytes_moved for row in points):
        best = max((row for row in points if row.bytes_moved == size), key=lambda row: row.bytes_per_second)
        place = (size / 1e6, best.bytes_per_second / 1e9)
        axes.annotate(best.case, place, fontsize=6, rotation=30, textcoords="offset points", xytext=(2, 4))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.25, y=0.15)  # room for the names
    axes.set_xlabel("bytes the case must move at least, MB")
    axes.set_ylabel("those bytes over the time taken, GB/s")
    axes.legend(fontsize=7)
    figure.suptitle(caption, fontsize=8)
    return _save(figure, directory / "roofline.png")


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
