"""The launch table: the tile each kernel family works in, by row length and accumulation dtype, and how it is launched.

Sizes follow from bytes: a thread holds one to four 16-byte vectors, which is what hides the latency of device memory,
and an accumulated tile stays under 32 values a thread so that nothing spills. ``MIXUPE_AUTOTUNE=1`` times the table's
neighbours once per key on the device at hand and prints the choice; another tile may change the last bit of a sum.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference import accumulate_dtype


class Tile(NamedTuple):
    """What one program works on: ``rows`` × ``block`` values at a time, by ``warps`` warps."""

    rows: int
    block: int
    warps: int


ANY = 1 << 62

# family -> accumulation dtype -> {longest row: tile}; a row longer than its tile is looped over.
TABLE: dict[str, dict[torch.dtype, dict[int, Tile]]] = {
    "row_stats": {
        torch.float32: {
            16: Tile(64, 16, 4),
            64: Tile(32, 64, 4),
            256: Tile(8, 256, 4),
            1024: Tile(1, 1024, 4),
            ANY: Tile(1, 4096, 8),
        },
        torch.float64: {16: Tile(64, 16, 4), 256: Tile(4, 256, 4), ANY: Tile(1, 2048, 8)},
    },
    "row_gradient": {
        torch.float32: {
            16: Tile(64, 16, 4),
            64: Tile(32, 64, 4),
            256: Tile(8, 256, 4),
            1024: Tile(1, 1024, 4),
            ANY: Tile(1, 4096, 8),
        },
        torch.float64: {16: Tile(64, 16, 4), 256: Tile(4, 256, 4), ANY: Tile(1, 2048, 8)},
    },
    # The same where a program first sums its rows' targets: two streams and an edge to keep at hand.
    "row_gradient_summed": {
        torch.float32: {
            16: Tile(64, 16, 4),
            64: Tile(32, 64, 4),
            256: Tile(8, 256, 4),
            1024: Tile(1, 1024, 4),
            ANY: Tile(1, 2048, 8),
        },
        torch.float64: {16: Tile(64, 16, 4), 256: Tile(4, 256, 4), ANY: Tile(1, 1024, 8)},
    },
    "mix": {
        torch.float32: {256: Tile(1, 256, 1), 1024: Tile(1, 1024, 4), ANY: Tile(1, 4096, 8)},
        torch.float64: {512: Tile(1, 512, 4), ANY: Tile(1, 2048, 8)},
    },
    "sum": {
        torch.float32: {256: Tile(1, 256, 1), 1024: Tile(1, 1024, 4), ANY: Tile(1, 4096, 8)},
        torch.float64: {512: Tile(1, 512, 4), ANY: Tile(1, 2048, 8)},
    },
}

# Rows are split over programs where there are fewer rows than this: a device runs some 500 to 1000 programs of eight
# warps at once. A constant, not the device's own count, so that every device sums in the same order.
PROGRAMS = 512

_tuned: dict[tuple, Tile] = {}


def tile_for(family: str, dtype: torch.dtype, length: int) -> Tile:
    """The table's tile for rows of ``length`` values of ``dtype``."""
    table = TABLE[family][accumulate_dtype(dtype)]
    return table[min(longest for longest in table if length <= longest)]


def neighbours(tile: Tile) -> Iterator[Tile]:
    """The tile itself, then half and twice its warps and its rows (its block, where a program has one row)."""
    yield tile
    for warps in (tile.warps // 2, tile.warps * 2):
        if 1 <= warps <= 16:
            yield tile._replace(warps=warps)
    for num, den in ((1, 2), (2, 1)):
        if tile.rows > 1:
            yield tile._replace(rows=tile.rows * num // den)
        else:
            yield tile._replace(block=tile.block * num // den)


def launch_tiled(family: str, like: Tensor, length: int, run: Callable[[Tile], None], repeatable: bool = True) -> None:
    """``run`` the launch with its tile on the device of ``like``; what is not ``repeatable`` (in place) is never tuned."""
    tile = tile_for(family, like.dtype, length)
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        if repeatable and os.environ.get("MIXUPE_AUTOTUNE") == "1":
            key = (family, like.device, like.dtype, tuple(like.shape), length)
            if key not in _tuned:
                times = {other: triton.testing.do_bench(lambda other=other: run(other)) for other in neighbours(tile)}
                _tuned[key] = min(times, key=times.get)
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
