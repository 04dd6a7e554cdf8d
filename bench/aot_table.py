"""The table of ``bench aot``: a row a kernel, what is counted of it, the bars, and its picture."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import torch

from mixupe_kernels.conventions import accumulate_dtype

from . import aot_code
from .results import read_csv


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operators: ``kind`` of target for the losses, of pairing for mix."""

    operator: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.operator}-{self.kind}-{self.dtype}-{'x'.join(map(str, self.shape))}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel of a case. ``spilled``: bytes of local memory a thread.

    From ``elements`` on it is of the main part, see ``aot_code``; ``all_instructions`` an element are the whole kernel's, and
    ``h100`` and ``h200`` the shares of the copy rate that they allow. None where nothing is counted.
    """

    target: str
    case: str
    kernel: str
    threads: int
    stages: int
    registers: int
    shared: int
    spilled: int
    wide_loads: int
    wide_stores: int
    language: str = "triton"
    looped: bool | None = None
    elements: int | None = None
    instructions: float | None = None
    mufu: float | None = None
    in_flight: int | None = None
    barriers: int | None = None
    shuffles: int | None = None
    all_instructions: float | None = None
    h100: float | None = None
    h200: float | None = None


# What is counted: kernels that move all elements of a case, whether their elements are those they store, and their exponentials.
COUNTED = {
    "row_stats": (False, 1),
    "row_gradient": (True, 1),
    "mix_rows": (True, 0),
    "mix_pairs": (True, 0),
    "forward_rows": (False, 1),
    "backward_rows": (True, 1),
    "forward_parts": (False, 1),
    "backward_parts": (True, 1),
    "mix_aligned": (True, 0),
}
COUNTED_TARGETS = ("sm_90", "sm_100")


class Bar(NamedTuple):
    """At most, or for loads in flight at least, ``limit``, of all kernels of sm_90 that the pattern finds in case and kernel."""

    pattern: str
    field: str
    limit: float


# The budgets of every kernel, of the loop that moves its elements. Beside them what is reached of Triton's rows of 1000 as a whole:
# four rows a warp share what finishing a row takes.
# One exception: batches of fewer than 2048 rows have a warp a row and no loop, so that more multiprocessors have work. Counted
# whole, a row of 1000 takes 17 instructions an element forward and 24 backward there, and the batch is too small to wait for them.
ROWS = r"mixed-bfloat16-(4096x1000|1024x21841|64x128256) {}"
FORWARD, BACKWARD = ROWS.format("(row_stats|forward)"), ROWS.format("(row_gradient|backward)")
IMAGES = "mix-(random|flip)-{}-256x3x224x224 mix_"
INNERMOST = r"mix-channels_last(_flip)?-uint8-256x3x224x224 mix_aligned"  # Triton's count of channels that are innermost has no bar
# CutMix's box in Triton. Pictures of 32 by 32 have a tile each, half as long, and the same work once for it. float32 has four elements
# in a pack, not eight or sixteen: the pack's line, column and sides of the box are 7 of its 20.
CUT = "mix-cut(_flip)?-{}-(256x3x224x224|128x3x32x32) mix_(rows|pairs)"
BARS = (
    Bar(FORWARD, "instructions", 10),
    Bar(BACKWARD, "instructions", 16),
    Bar(f"{FORWARD}|{BACKWARD}", "barriers", 0),
    Bar(f"{FORWARD}|{BACKWARD}", "in_flight", 4),
    Bar(r"mixed-bfloat16-4096x1000 row_(stats|gradient)", "all_instructions", 12),
    Bar(IMAGES.format("bfloat16"), "instructions", 10),
    Bar(IMAGES.format("uint8"), "instructions", 12),
    Bar(IMAGES.format("(bfloat16|uint8)"), "in_flight", 4),
    Bar(INNERMOST, "instructions", 12),
    Bar(INNERMOST, "in_flight", 4),
    Bar(CUT.format("bfloat16"), "instructions", 16),
    Bar(CUT.format("float32"), "instructions", 21),
    Bar(CUT.format("uint8"), "instructions", 18),
    Bar(CUT.format("(bfloat16|float32|uint8)"), "in_flight", 4),
    Bar("", "spilled", 0),
)


# What the page on performance shows: the work, and its kernels' pattern. Of C++'s kernels for bytes, those that write bfloat16.
_ROWS, _IMAGES = (
    r"mixed-bfloat16-({}) (row_{}|{}_)",
    r"mix-{}-{}-256x3x224x224 (mix_rows|mix_pairs|mix_aligned.*BFloat16)",
)
SUMMARY = {
    "cross-entropy and entropy, C = 21841 and 128256": _ROWS.format("1024x21841|64x128256", "stats", "forward"),
    "its backward": _ROWS.format("1024x21841|64x128256", "gradient", "backward"),
    "forward, 4096 rows of 1000": _ROWS.format("4096x1000", "stats", "forward"),
    "backward, 4096 rows of 1000": _ROWS.format("4096x1000", "gradient", "backward"),
    "forward, 256 rows of 1000, no loop": _ROWS.format("256x1000", "stats", "forward"),
    "backward, 256 rows of 1000, no loop": _ROWS.format("256x1000", "gradient", "backward"),
    "mix, 3×224×224": _IMAGES.format("random", "bfloat16"),
    "mix with the flipped batch": _IMAGES.format("flip", "bfloat16"),
    "bytes → normalised → mixed → bfloat16": _IMAGES.format("random", "uint8"),
    "the same with the flipped batch": _IMAGES.format("flip", "uint8"),
    "bytes whose three channels are innermost": _IMAGES.format("channels_last", "uint8"),
    "CutMix, 3×224×224": _IMAGES.format("cut", "bfloat16"),
    "CutMix with the flipped batch": _IMAGES.format("cut_flip", "bfloat16"),
    "CutMix of bytes → normalised → bfloat16": _IMAGES.format("cut", "uint8"),
    "CutMix of float32": _IMAGES.format("cut", "float32"),
}


def summary(table: Path) -> list[list[str]]:
    """The rows of ``SUMMARY``: the work, instructions an element and loads in flight of Triton's and C++'s kernels, and their bar.

    Of several kernels, the most instructions and the fewest loads. Triton's have those of the whole kernel beside those of
    the loop; C++'s code outside it is there for what most calls do not need.
    """
    kernels = [row for row in read_csv(table, Kernel) if row.target == "sm_90" and row.instructions is not None]
    rows = []
    for work, pattern in SUMMARY.items():
        found = [row for row in kernels if re.search(pattern, f"{row.case} {row.kernel}")]
        held = [(bar.limit, kernel.language) for bar, kernel, _ in verdicts(found) if bar.field == "instructions"]
        bar = " and ".join(sorted({f"{limit:g}" for limit, _ in held})) or "–"
        if held and {language for _, language in held} != {row.language for row in found}:
            bar += ", C++ alone"
        cells = [_counts([row for row in found if row.language == language]) for language in ("triton", "cuda")]
        rows.append([work, *cells, bar])
    return rows


def _counts(kernels: list[Kernel]) -> str:
    if not kernels:
        return "–"
    loop, whole = (max(getattr(row, name) for row in kernels) for name in ("instructions", "all_instructions"))
    text = f"{loop:.1f}, {min(row.in_flight for row in kernels)} loads"
    return f"{text}; {whole:.1f} in all" if kernels[0].language == "triton" and whole > loop else text


def verdicts(kernels: list[Kernel]) -> list[tuple[Bar, Kernel, bool]]:
    """Each bar with each kernel it is for, and whether that clears it."""
    found = []
    for bar, kernel in itertools.product(BARS, kernels):
        value = getattr(kernel, bar.field)
        counted = bar.field == "spilled" or (kernel.target == "sm_90" and value is not None)
        if counted and re.search(bar.pattern, f"{kernel.case} {kernel.kernel}"):
            found.append((bar, kernel, value >= bar.limit if bar.field == "in_flight" else value <= bar.limit))
    return found


def counted(row: Kernel, case: Case, code: list[aot_code.Instruction], work: float) -> Kernel:
    """The row with what its code counts, ``work`` being a thread's elements."""
    (stores, mufu), size = COUNTED[row.kernel.split("<")[0]], getattr(torch, case.dtype).itemsize
    written = (2 if case.dtype == "uint8" else size) if stores else 0
    dense = accumulate_dtype(getattr(torch, case.dtype)).itemsize if case.kind in ("dense", "sigmoid") else 0
    work *= 2 if row.kernel == "mix_pairs" else 1
    part = aot_code.main_part(code, written, size + dense, mufu if case.dtype != "float64" else 0)
    if part is None:
        return row
    shares = {
        device.name: aot_code.copy_share(device, part, work, bytes_of(row), row.threads, row.registers, row.shared)
        for device in aot_code.DEVICES
    }
    figures = {**part._asdict(), "all_instructions": aot_code.instructions_of_all(part, work), **shares}
    figures.pop("rest")
    return dataclasses.replace(row, **{key: round(value, 3) for key, value in figures.items()})


def picture(table: Path) -> Path:
    """Draw, beside the table, the kernels of sm_90 under the roof that issue slots and bytes make."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_csv(table, Kernel) if row.target == "sm_90" and row.all_instructions]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for device in aot_code.DEVICES:
        # Bytes a second at x instructions a byte: the copy rate, or less where slots are short.
        xs = [2 ** (k / 8) for k in range(-16, 57)]
        axes.plot(
            xs, [min(device.bytes_per_second, device.slots / x) / 1e12 for x in xs], label=f"roof of {device.name}"
        )
    for language, marker in (("triton", "o"), ("cuda", "^")):
        own = [(row, bytes_of(row)) for row in rows if row.language == language]
        xs = [row.all_instructions / size for row, size in own]
        ys = [row.h200 * aot_code.DEVICES[1].bytes_per_second / 1e12 for row, _ in own]
        axes.scatter(xs, ys, marker=marker, s=16, label=f"{language}, predicted on {aot_code.DEVICES[1].name}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("instructions a byte that must be moved (sm_90, the whole kernel)")
    axes.set_ylabel("TB/s")
    axes.legend(fontsize=7)
    figure.suptitle("Predicted from machine code; no GPU has run it", fontsize=8)
    path = table.with_suffix(".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def bytes_of(row: Kernel) -> float:
    """The bytes an element of the kernel's case must move."""
    kind, dtype = row.case.split("-")[1:3]
    size = getattr(torch, dtype).itemsize
    dense = 4 if kind in ("dense", "sigmoid") else 0
    return size + dense + ((2 if dtype == "uint8" else size) if COUNTED[row.kernel.split("<")[0]][0] else 0)
