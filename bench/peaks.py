"""The ceilings of a device, measured in the run they are used in: bytes per second of a copy and of a read."""

import functools
import statistics
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import COPY_RATE, IMAGES, READ_RATE, Row
from .timing import Contender, CudaTimer, HostTimer, interleave_on_device

BLOCK, STEPS = 4096, 4


@triton.jit
def _read_kernel(source, sums, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0) * (BLOCK * STEPS)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        total += tl.load(source + first + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total))


def _read(source: Tensor, sums: Tensor) -> Tensor:
    _read_kernel[(sums.shape[0],)](source, sums, BLOCK=BLOCK, STEPS=STEPS, num_warps=8)
    return sums


def ceilings(timer: CudaTimer | HostTimer, device: str, rounds: int, dry: bool) -> list[Row]:
    """One row for the copy rate and one for the read rate, each the best of the ways tried.

    Copies of 1 GiB and of a batch of images; a Triton kernel that loads 16 bytes a thread at a time, and torch.sum.
    """
    counts = (4 * BLOCK * STEPS, 2 * BLOCK * STEPS) if dry else (1 << 28, torch.Size(IMAGES).numel())
    contenders, moved, kind = {}, {}, {}

    def add(name: str, rate: str, nbytes: int, calls: list) -> None:
        contenders[name], moved[name], kind[name] = Contender(calls, nullcontext), nbytes, rate

    for count in counts:
        buffers = [torch.randn(count, device=device) for _ in range(3)]
        pairs = list(zip(buffers, [*buffers[1:], buffers[0]], strict=True))
        add(f"copy_ of {count}", COPY_RATE, 2 * buffers[0].nbytes, [functools.partial(b.copy_, a) for a, b in pairs])
        add(f"torch.sum of {count}", READ_RATE, buffers[0].nbytes, [functools.partial(torch.sum, b) for b in buffers])
        sums = torch.zeros(count // (BLOCK * STEPS), device=device)
        nbytes = sums.shape[0] * BLOCK * STEPS * buffers[0].itemsize
        add(f"Triton read of {count}", READ_RATE, nbytes, [functools.partial(_read, b, sums) for b in buffers])
    notes = []
    figures = interleave_on_device(timer, contenders, rounds, lambda name, error: notes.append(f"{name}: {error}"))
    best = {}
    for name, figure in figures.items():
        seconds = statistics.median(figure.kernel or figure.stream)
        row = Row("ceiling", kind[name], seconds, bytes_moved=moved[name], bytes_per_second=moved[name] / seconds)
        row.note = "; ".join([name, *notes])
        if row.provider not in best or best[row.provider].bytes_per_second < row.bytes_per_second:
            best[row.provider] = row
    return [best[COPY_RATE], best[READ_RATE]]
