"""The Triton kernels compiled for GPUs that are not here: they compile, do not spill, and move 16 bytes at a time.

All variants for sm_90, one case of each kernel for the other targets; `python -m bench aot` compiles all for all.
"""

import collections
import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import triton
from triton.runtime.jit import JITFunction

from bench.aot import CALLS, TARGETS, Case, cases, compile_case, compiled_only
from bench.aot_table import BARS, verdicts
from mixupe_kernels.ops.triton import KERNELS, launch

ROOT = Path(__file__).parents[1]
TRITON_3_6 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
REPRESENTATIVE = [
    Case("mixupe_loss", "mixed", "float32", (256, 10)),
    Case("mixupe_loss", "mixed", "float32", (4096, 100)),
    Case("mixupe_loss", "mixed", "bfloat16", (64, 128256)),
    Case("mixupe_loss", "dense", "bfloat16", (1024, 21841)),
    Case("mixupe_loss", "dense", "float32", (64, 128256)),
    Case("mix", "random", "uint8", (256, 3, 224, 224)),
    Case("mix", "flip", "bfloat16", (256, 3, 224, 224)),
    Case("mix", "cut", "bfloat16", (256, 3, 224, 224)),
    Case("mix", "cut_flip", "bfloat16", (256, 3, 224, 224)),
    Case("mix_backward", "random", "bfloat16", (256, 3, 224, 224)),
]


# Bytes of local memory a thread, with registers to spare: Triton 3.7 and 3.8 need none.
SPILLED_BY_3_6 = {("ce_entropy-weighted-float64-1024x21841", "row_gradient"): 8}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_sm_90(case):
    for kernel in compile_case(case, "sm_90"):
        spilled = SPILLED_BY_3_6.get((kernel.case, kernel.kernel), 0) if TRITON_3_6 else 0
        assert kernel.spilled == spilled, kernel
        loads, stores = wide_accesses(case, kernel.kernel)
        assert kernel.wide_loads >= loads and kernel.wide_stores >= stores, (kernel, loads, stores)


def wide_accesses(case, kernel):
    """How many 16-byte accesses a thread has to make for a tile, where rows allow it: (loads, stores)."""
    dtype, length = getattr(torch, case.dtype), math.prod(case.shape[1:])
    size = dtype.itemsize
    if case.operator in ("mix", "mix_backward"):
        out_size = 2 if dtype == torch.uint8 else size
        family = "mix_cut" if "cut" in case.kind and size < 8 else "mix"
        family = "sum" if case.operator == "mix_backward" else f"{family}_narrow" if size <= 2 else family
        streams = {"mix_rows": (2, 1), "mix_pairs": (2, 2), "gather_rows": (1, 1), "dot_rows": (2, 0)}.get(kernel)
        # to_channels_last gathers bytes, and samples of odd sizes are not aligned.
        if streams is None or case.kind == "to_channels_last" or case.shape[-1] % 2:
            return 0, 0
        tile = launch.tile_for(family, dtype, math.prod(case.shape[2:]) if "cut" in case.kind else length)
        return tuple(
            count * tile.block * bytes_each // (tile.warps * 32 * 16)
            for count, bytes_each in zip(streams, (size, out_size), strict=True)
        )
    # Shorter rows are not peeled.
    if kernel not in ("row_stats", "row_gradient") or length < 512:
        return 0, 0
    dense = case.kind in ("dense", "sigmoid")
    summed = dense or case.kind == "weighted"
    suffix = {"row_stats": "_dense" * dense, "row_gradient": "_summed" * summed}[kernel]
    tile = launch.spread(launch.tile_for(kernel + suffix, dtype, length), case.shape[0], length)
    vectors = tile.rows * tile.block * size // (tile.warps * 32 * 16)
    targets = tile.rows * tile.block * max(size, 4) // (tile.warps * 32 * 16) if dense else 0
    # The loads of a pipelined loop stand before it as well, once for each tile that is fetched ahead.
    stages = tile.stages if length > tile.block else 1
    return (vectors + targets) * stages, vectors if kernel == "row_gradient" else 0


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_other_targets(case, target):
    for kernel in compile_case(case, target):
        assert kernel.spilled == 0, kernel


@pytest.mark.parametrize("columns", [4096, 21841, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stages_fetch_the_tiles_of_a_loop_ahead(monkeypatch, dtype, columns):
    tile, compiled = launch.tile_for("row_stats", dtype, columns), []
    for stages in launch.STAGES:
        entry = {launch.ANY: tile._replace(stages=stages)}
        monkeypatch.setitem(launch.TABLE["row_stats"], launch.accumulate_dtype(dtype), entry)
        case = Case("mixupe_loss", "mixed", str(dtype).removeprefix("torch."), (4096, columns))
        compiled.append(compile_case(case, "sm_90")[0])
    plain, ahead = compiled[0], [stages - 1 if columns > tile.block else 0 for stages in launch.STAGES]
    assert [kernel.stages for kernel in compiled] == list(launch.STAGES)
    assert [kernel.wide_loads for kernel in compiled] == [plain.wide_loads * (1 + tiles) for tiles in ahead]
    for kernel, tiles in zip(compiled, ahead, strict=True):
        of_tiles = tile.rows * tile.block * dtype.itemsize * tiles
        # What the last reduction takes of it is the tiles' before; Triton 3.6 may put the two side by side.
        assert kernel.shared in (max(plain.shared, of_tiles), plain.shared + of_tiles)


@pytest.mark.parametrize("columns", [100, 1000, 1001, 4096])
def test_few_rows_are_spread_over_programs(columns):
    shared, tiles = launch.tile_for("row_stats", torch.bfloat16, columns), []
    for rows in (1, 256, launch.MANY - 1, launch.MANY, 1 << 20):
        tile = launch.spread(shared, rows, columns)
        shape = launch.tile_shape(tile, torch.empty(1, columns, dtype=torch.bfloat16))
        assert tile.block == shape["PACKS"] * shape["LANES"] * shape["VEC"]
        assert tile.rows * tile.block <= launch.HELD * 32 * tile.warps
        tiles.append(tile)
    few = tiles[0]
    assert tiles == [few] * 3 + [shared] * 2  # two kernels, however batches change
    assert few.rows <= shared.rows // 4 and few.block >= min(columns, 1024)


@pytest.mark.parametrize(
    "columns, begin, vec", [(1000, 0, 8), (1000, 2, 8), (1000, 1, 1), (1001, 1, 1), (100, 0, 4), (100, 1, 1), (9, 0, 1)]
)
def test_pairs_are_read_at_multiples_of_4_bytes(columns, begin, vec):
    logits = torch.empty(begin + 4 * columns, dtype=torch.bfloat16)[begin:].view(4, columns)
    tile = launch.tile_for("row_stats", torch.bfloat16, columns)
    assert launch.tile_shape(tile, logits)["VEC"] == vec


OURS = ("row_stats", "row_gradient", "mix_rows", "mix_pairs")  # CUDA C++ has bars of its own
BARRED = [
    case for case in cases() if any(re.search(bar.pattern, f"{case} {name}") for bar in BARS[:-1] for name in OURS)
]


@pytest.mark.skipif(
    TRITON_3_6,
    reason="Triton 3.6 gives neighbouring lanes different packs, and its loops add across lanes",
)
@pytest.mark.parametrize("case", BARRED, ids=str)
def test_rows_and_images_clear_the_bars_on_instructions(case):
    judged = verdicts(compile_case(case, "sm_90"))
    assert {"instructions", "spilled"} <= {bar.field for bar, *_ in judged}
    assert not [(bar, kernel) for bar, kernel, met in judged if not met]


def test_command_writes_a_row_for_each_kernel(tmp_path):
    path = tmp_path / "aot.csv"
    command = [sys.executable, "-m", "bench", "aot", "--only", "mixupe_loss-mixed-float32-256x10", "--out", str(path)]
    said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    with path.open() as file:
        rows = list(csv.DictReader(file))
    kernels = {"row_stats", "loss_total", "row_gradient"}
    assert {(row["target"], row["kernel"]) for row in rows} == {
        (name, kernel) for name in TARGETS for kernel in kernels
    }
    assert all(row["stages"] == "1" and row["spilled"] == "0" for row in rows) and f"written: {path}" in said


def test_cases_reach_every_entry_of_the_launch_table(monkeypatch):
    used = set()
    tile_for = launch.tile_for

    def recorded(family, dtype, length):
        tile = tile_for(family, dtype, length)
        used.add((family, launch.accumulate_dtype(dtype), tile))
        return tile

    monkeypatch.setattr(launch, "tile_for", recorded)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
    for case in cases():
        CALLS[case.operator](case)
    table = {
        (family, dtype, tile)
        for family, tables in launch.TABLE.items()
        for dtype, entries in tables.items()
        for tile in entries.values()
    }
    assert used == table


def kernels_of_a_run(batches, calls):
    """Name → the distinct kernels that the calls compile over all batches of a run."""
    found = collections.defaultdict(set)
    with compiled_only(TARGETS["sm_90"]) as kernels:
        for batch in batches:
            calls(*batch)
    for name, kernel, _ in kernels:
        found[name].add(kernel.hash)
    return {name: len(hashes) for name, hashes in found.items()}


# (pixels, rows): scales in turn, and an odd number of rows in the last batch.
MULTI_SCALE = [(224, 64), (192, 64), (160, 64), (224, 37), (192, 33)]


@pytest.mark.parametrize("kind", ["random", "flip", "pixels", "cut", "cut_flip", "clean rows"])
def test_a_run_over_several_scales_compiles_two_kernels_of_a_family_at_most(kind):
    def batch(pixels, rows):
        x = torch.empty(rows, 3, pixels, pixels, dtype=torch.uint8 if kind == "pixels" else torch.bfloat16)
        index, lam, three = torch.empty(rows, dtype=torch.int64), torch.empty(()), torch.empty(3)
        partner = None if "flip" in kind else index
        box = torch.empty(4, dtype=torch.int64) if "cut" in kind else None
        normalise = (three, three, torch.bfloat16, None) if kind == "pixels" else (None, None, None, None)
        total, chosen = rows, None
        if kind == "clean rows":
            total, chosen = rows + rows // 4, torch.empty(rows + rows // 4, dtype=torch.int64)
            _, partner, *_ = KERNELS["mixed_target"](index, partner, lam, chosen, rows)
        KERNELS["mix"](x, partner, lam, chosen, *normalise, box)
        logits, labels, weight = (
            torch.empty(total, 1000, dtype=torch.bfloat16),
            torch.empty(total, dtype=torch.int64),
            torch.empty(total),
        )
        counts = (rows, total - rows) if chosen is not None else (total, 0)
        _, *saved = KERNELS["mixupe_loss"](logits, labels, labels, weight, lam, lam, *counts)
        KERNELS["mixupe_loss_backward"](lam, logits, labels, labels, weight, *saved, counts[0])

    found = kernels_of_a_run(MULTI_SCALE, batch)
    assert {"row_stats", "loss_total", "row_gradient", "mix_pairs" if "flip" in kind else "mix_rows"} <= set(found)
    assert max(found.values()) <= 2, found


@pytest.mark.parametrize("scales", [MULTI_SCALE, [(32, 64), (28, 64), (24, 64), (32, 37)]], ids=["large", "small"])
def test_gradients_of_mix_over_several_scales_compile_two_kernels_of_a_family_at_most(scales):
    def batch(pixels, rows):
        grad, index = torch.empty(rows, 3, pixels, pixels), torch.empty(2 * rows, dtype=torch.int64)
        KERNELS["gather_sum"](grad, index, torch.empty(2 * rows), torch.empty(rows + 1, dtype=torch.int64))
        KERNELS["row_dot"](grad, grad, index[:rows], index[:rows])

    found = kernels_of_a_run(scales, batch)
    assert {"gather_rows", "dot_rows"} <= set(found)
    assert max(found.values()) <= 2, found


@pytest.mark.parametrize("kind", ["pixels", "cut", "cut_flip"])
def test_small_images_of_several_scales_compile_two_kernels_at_most(kind):
    def batch(pixels, rows):
        x, three = torch.empty(rows, 3, pixels, pixels, dtype=torch.uint8), torch.empty(3)
        partner = None if kind == "cut_flip" else torch.empty(rows, dtype=torch.int64)
        box = None if kind == "pixels" else torch.empty(4, dtype=torch.int64)
        KERNELS["mix"](x, partner, torch.empty(()), None, three, three, torch.bfloat16, None, box)

    found = kernels_of_a_run([(32, 64), (28, 64), (24, 64), (32, 37)], batch)
    assert max(found.values()) <= 2, found


def test_numbers_of_the_loss_compile_one_kernel():
    def loss(penalty, threshold, clean_weight):
        logits, labels, one = torch.empty(64, 1000), torch.empty(64, dtype=torch.int64), torch.empty(())
        KERNELS["mixupe_loss"](
            logits, labels, None, None, one, one, 48, 16, penalty, threshold, True, 0.0, False, clean_weight
        )

    found = kernels_of_a_run(
        [(1, threshold, weight) for threshold in (0.5, 1.0, 0.3) for weight in (0.25, 0.3, 1.0)], loss
    )
    assert found == {"row_stats": 1, "loss_total": 1}


@pytest.mark.parametrize("kind", ["labels", "dense", "weighted"])
def test_every_label_smoothing_compiles_one_kernel_and_none_another(kind):
    def step(smoothing):
        logits, labels, rows = torch.empty(64, 1000), torch.empty(64, dtype=torch.int64), torch.empty(64)
        target = (torch.empty(64, 1000) if kind == "dense" else labels, None, None)
        options = (torch.empty(1000) if kind == "weighted" else None, smoothing)
        KERNELS["ce_entropy"](logits, *target, *options)
        KERNELS["ce_entropy_backward"](rows, rows, rows, logits, rows, rows, *target, *options)

    assert kernels_of_a_run([(0.1,), (0.2,), (1.0,)], step) == {"row_stats": 1, "row_gradient": 1}
    assert kernels_of_a_run([(0.0,), (0.1,), (0.2,)], step) == {"row_stats": 2, "row_gradient": 2}
