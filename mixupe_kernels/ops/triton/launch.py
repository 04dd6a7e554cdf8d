"""The launch table: the tile each kernel family works in, by row length and accumulation dtype, and how it is launched.

Sizes follow from bytes: a thread holds one to four 16-byte vectors, which is what hides the latency of device memory,
and an accumulated tile stays under 32 values a thread so that nothing spills. ``MIXUPE_AUTOTUNE=1`` times the table's
neighbours once per key on the device at hand and prints the choice; another tile may change the last bit of a sum.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...conventions import accumulate_dtype


class Tile(NamedTuple):
    """What one program works on: ``rows`` × ``block`` values at a time, by ``warps`` warps; where it loops over a row,
    the loads of ``stages`` - 1 further tiles are on their way meanwhile."""

    rows: int
    block: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """What a launch is given of it by Triton's names; kernels that loop take ``num_stages`` as an argument too."""
        return {"num_warps": self.warps, "num_stages": self.stages}


ANY = 1 << 62

# family -> accumulation dtype -> {longest row: tile}; a row longer than its tile is looped over.
#
# A thread has 32 values of a row, four 16-byte loads of bfloat16 on their way before the first is used. That is enough: at an
# assumed latency of 0.8 µs, 4.3 TB/s ask for 26 KB of a multiprocessor at all times, and its 1280 threads have 80 KB. One stage
# everywhere: with two, the next tile would be copied to shared memory meanwhile, and a barrier stand in the loop. Rows of 257 to
# 4096 have eight lanes each, four rows a warp: joining the lanes and finishing the rows takes a warp as long as 27 values
# of each lane, once for the four. No GPU has timed any of this; the counts are those of `python -m bench aot`.
TABLE: dict[str, dict[torch.dtype, dict[int, Tile]]] = {
    "row_stats": {
        torch.float32: {
            16: Tile(64, 16, 4, 1),
            64: Tile(32, 64, 4, 1),
            256: Tile(32, 128, 4, 1),
            4096: Tile(16, 256, 4, 1),
            ANY: Tile(1, 8192, 8, 1),
        },
        torch.float64: {16: Tile(64, 16, 4, 1), 256: Tile(4, 256, 4, 1), ANY: Tile(1, 2048, 8, 1)},
    },
    # The same where targets are dense: a second stream as long as the first.
    "row_stats_dense": {
        torch.float32: {
            16: Tile(64, 16, 4, 1),
            64: Tile(32, 64, 4, 1),
            256: Tile(8, 256, 8, 1),
            1024: Tile(2, 1024, 4, 1),
            ANY: Tile(1, 2048, 4, 1),
        },
        torch.float64: {16: Tile(64, 16, 4, 1), 256: Tile(4, 256, 8, 1), ANY: Tile(1, 1024, 4, 1)},
    },
    "row_gradient": {
        torch.float32: {
            16: Tile(64, 16, 4, 1),
            64: Tile(32, 64, 4, 1),
            256: Tile(32, 128, 4, 1),
            4096: Tile(16, 256, 4, 1),
            ANY: Tile(1, 8192, 8, 1),
        },
        torch.float64: {16: Tile(64, 16, 4, 1), 256: Tile(4, 256, 2, 1), ANY: Tile(1, 2048, 8, 1)},
    },
    # The same where a program first sums its rows' targets: two streams and an edge to keep at hand.
    "row_gradient_summed": {
        torch.float32: {
            16: Tile(64, 16, 4, 1),
            64: Tile(32, 64, 4, 1),
            256: Tile(8, 256, 4, 1),
            1024: Tile(2, 1024, 4, 1),
            ANY: Tile(1, 2048, 4, 1),
        },
        torch.float64: {16: Tile(64, 16, 4, 1), 256: Tile(8, 128, 4, 1), ANY: Tile(1, 1024, 4, 1)},
    },
    "mix": {
        torch.float32: {256: Tile(1, 256, 1, 1), 1024: Tile(1, 1024, 4, 1), ANY: Tile(1, 4096, 8, 1)},
        torch.float64: {512: Tile(1, 512, 4, 1), ANY: Tile(1, 2048, 8, 1)},
    },
    # The same for elements of one or two bytes: eight 16-byte loads of each sample in a thread, of which ptxas has six on
    # their way at once, and of four only three.
    "mix_narrow": {
        torch.float32: {256: Tile(1, 256, 1, 1), 1024: Tile(1, 1024, 2, 1), ANY: Tile(1, 4096, 2, 1)},
    },
    # The same where the layout changes, so that each element's place is worked out and kept.
    "mix_placed": {torch.float32: {1024: Tile(1, 1024, 4, 1), ANY: Tile(1, 4096, 4, 1)}},
    # Where a box is cut: again eight 16-byte loads of each sample in a thread, of bytes four, and a warp for each tile of
    # bytes, which are handed to the threads that store them without a barrier.
    "mix_cut": {torch.float32: {1024: Tile(1, 1024, 1, 1), ANY: Tile(1, 2048, 2, 1)}},
    "mix_cut_narrow": {torch.float32: {1024: Tile(1, 1024, 1, 1), ANY: Tile(1, 2048, 1, 1)}},
    # The same where elements have no pack in common: at odd strides, or beside those of other channels with a scale each.
    "mix_cut_placed": {torch.float32: {1024: Tile(1, 1024, 2, 1), ANY: Tile(1, 2048, 4, 1)}},
    "sum": {
        torch.float32: {256: Tile(1, 256, 1, 1), 1024: Tile(1, 1024, 4, 1), ANY: Tile(1, 4096, 8, 1)},
        torch.float64: {512: Tile(1, 512, 4, 1), ANY: Tile(1, 2048, 8, 1)},
    },
}

# Rows are split over programs where there are fewer rows than this: a device runs some 500 to 1000 programs of eight
# warps at once. A constant, not the device's own count, so that every device sums in the same order.
PROGRAMS = 512

# Tiles of SHARED_FROM rows or more are for MANY rows or more: 128 programs, about one for each multiprocessor.
SHARED_FROM, MANY = 16, 2048
HELD = 32  # values of a tile that a thread holds

# The families whose programs loop over tiles, and the stages to try for them: at 4, three streams of float32 would
# need 144 KiB of shared memory, and sm_86, sm_89 and sm_120 have 99.
LOOPED, STAGES = ("row_stats", "row_stats_dense", "row_gradient_summed", "sum"), (1, 2, 3)

_tuned: dict[tuple, Tile] = {}


# Sizes and strides that change from batch to batch, as those of images of several scales do, are numbers of packs and a
# constant, the elements of a pack: a kernel serves every size of the same alignment, and loads as widely as one made for it.
MOST_PACKED = 16


def packs(size: int) -> tuple[int, int]:
    """(packs, elements of a pack), whose product is ``size``."""
    pack = math.gcd(size, MOST_PACKED)
    return size // pack, pack


def reciprocal(divisor: int) -> int:
    """What ``box.divide`` divides by: a 32-bit factor, and above it 64 plus the shift of the product.

    Granlund and Montgomery, Division by Invariant Integers using Multiplication (1994). The 64 makes every one an int64 to Triton.
    """
    shift = (divisor - 1).bit_length()
    return 64 + shift << 32 | -(-(1 << 31 + shift) // divisor)


def halves(number: float) -> tuple[float, float]:
    """A number as arguments of a kernel, which are float32: the nearest one, and what it leaves."""
    nearest = ctypes.c_float(number).value
    return nearest, number - nearest if math.isfinite(nearest) else 0.0


def tile_for(family: str, dtype: torch.dtype, length: int) -> Tile:
    """The table's tile for rows of ``length`` values of ``dtype``."""
    table = TABLE[family][accumulate_dtype(dtype)]
    return table[min(longest for longest in table if length <= longest)]


def spread(tile: Tile, rows: int, length: int) -> Tile:
    """The tile for so many rows: where they are few, fewer a program, so that more multiprocessors have one.

    A warp with four rows finishes them in a quarter of the instructions, but reads them one tile after another.
    """
    if tile.rows < SHARED_FROM or tile.block < LANES_FROM or rows >= MANY:
        return tile
    whole = triton.next_power_of_2(length)
    few = max(min(tile.rows // 4, tile.warps * 32 * HELD // whole), 1)
    return tile._replace(rows=few, block=min(tile.warps * 32 * HELD // few, whole))


def neighbours(tile: Tile, looped: bool) -> Iterator[Tile]:
    """The tile itself, half and twice its warps and its rows (its block, where a program has one row), then its other
    stages where it is ``looped``."""
    yield tile
    for warps in (tile.warps // 2, tile.warps * 2):
        if 1 <= warps <= 16:
            yield tile._replace(warps=warps)
    for num, den in ((1, 2), (2, 1)):
        if tile.rows > 1:
            yield tile._replace(rows=tile.rows * num // den)
        else:
            yield tile._replace(block=tile.block * num // den)
    if looped:
        yield from (tile._replace(stages=stages) for stages in STAGES if stages != tile.stages)


LANES_FROM = 128  # tiles of so many columns have a lane for each thread
PEEL_FROM = 512  # shorter rows have too few columns for separate edges to pay
SECTOR = 32  # bytes that lanes beside one another read at once, or more is read than is used


def tile_shape(tile: Tile, logits: Tensor) -> dict[str, int]:
    """A tile of rows as the kernels of logits have it: PACKS × ROWS × LANES × VEC.

    VEC columns are 16 bytes, or in short rows as many as all of them begin at multiples of. One where logits do not begin at
    a multiple of 4 bytes (z[:, 1:] of bfloat16), at which ``rows.load_tile`` reads pairs of them.
    """
    columns, size = logits.shape[1], logits.element_size()
    vec = 1 if logits.data_ptr() % 4 else 16 // size
    aligned = math.gcd(columns, logits.stride(0), vec)
    if columns < PEEL_FROM:
        vec = aligned
    lanes = max(tile.block // vec, 1)
    if tile.block >= LANES_FROM:
        least = SECTOR // (vec * size) if aligned == vec else 2 * vec  # an edge is a column a lane
        lanes = min(lanes, max(tile.warps * 32 // tile.rows, least))
    return {"ROWS": tile.rows, "PACKS": tile.block // (lanes * vec), "LANES": lanes, "VEC": vec}


def device_of(like: Tensor) -> AbstractContextManager:
    """What a launch has to run in: the device of ``like`` as the current one."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def launch_tiled(family: str, like: Tensor, length: int, run: Callable[[Tile], None], repeatable: bool = True) -> None:
    """``run`` the launch with its tile on the device of ``like``; what is not ``repeatable`` (in place) is never tuned."""
    tile = spread(tile_for(family, like.dtype, length), like.shape[0], length)
    with device_of(like):
        if repeatable and os.environ.get("MIXUPE_AUTOTUNE") == "1":
            key = (family, like.device, like.dtype, tuple(like.shape), length)
            if key not in _tuned:
                tiles = neighbours(tile, looped=family in LOOPED and length > tile.block)
                times = {other: triton.testing.do_bench(lambda other=other: run(other)) for other in tiles}
                _tuned[key] = min(times, key=times.__getitem__)
                print(f"mixupe: {family} {tuple(like.shape)} {like.dtype}: {_tuned[key]}, table {tile}", flush=True)
            tile = _tuned[key]
        run(tile)


def splits_for(rows: int, length: int, block: int) -> int:
    """Over how many programs to split each of ``rows`` long rows: a power of two, of at least one block each."""
    blocks = triton.cdiv(length, block)
    splits = 1
    while splits * 2 <= blocks and rows * splits * 2 <= PROGRAMS:
        splits *= 2
    return splits
