"""Every Triton kernel compiled ahead of time, for GPUs that need not be there: ``python -m bench aot``.

The launchers run as they are, on CPU tensors; only the last step differs: what they would launch is compiled for the
target instead. So the specialization is the one a launch would get. Per kernel ``results/aot.csv`` has the stages of
its loops, the registers, the shared memory, the bytes spilled to local memory and the 16-byte accesses to global
memory; of sm_90 and sm_100 also what ``aot_code`` counts in the machine code, and for CUDA C++ the same. ``BARS`` set the
exit status.

The cases: each entry of the launch table with each kind of target at a length people use, float32 and bfloat16 for the
common kinds, one of them for the rest, float64 where it has a table of its own; the samples of ImageNet, of CIFAR and
short ones for mixing.
"""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mixupe_kernels.conventions import accumulate_dtype
from mixupe_kernels.ops.triton import KERNELS

from . import aot_code, aot_cuda
from .aot_table import COUNTED, COUNTED_TARGETS, Case, Kernel, counted, picture, verdicts
from .results import RESULTS, write_csv

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def cases() -> list[Case]:
    """All cases; see the top of the module for how they are chosen."""
    rows = [(256, 10), (256, 50), (4096, 100), (4096, 1000), (4096, 4096), (1024, 21841), (64, 128256)]
    double = [(256, 10), (4096, 100), (4096, 1000), (1024, 21841)]
    pictures, short = (256, 3, 224, 224), [(256, 200), (256, 512), (128, 3, 32, 32)]
    odd, both = [(256, 3, 225, 225), (128, 3, 31, 31)], ("float32", "bfloat16")
    return [
        *(Case("mixupe_loss", kind, dtype, shape) for kind in ("mixed", "dense") for dtype in both for shape in rows),
        *(Case("mixupe_loss", "mixed", dtype, (256, 1000)) for dtype in both),
        *(Case("mixupe_loss", "smoothed", "bfloat16", shape) for shape in rows),
        *(Case("mixupe_loss", "sigmoid", "float32", shape) for shape in rows),
        *(Case("mixupe_loss", kind, "float64", shape) for kind in ("mixed", "dense", "sigmoid") for shape in double),
        *(Case("mixupe_loss", "mixed", "float16", shape) for shape in ((4096, 1000), (4096, 2000), (1024, 21841))),
        *(Case("ce_entropy", "weighted", "bfloat16", shape) for shape in rows),
        *(Case("ce_entropy", "weighted", "float64", shape) for shape in double[-1:]),
        *(Case("mix", kind, dtype, pictures) for kind in ("random", "flip") for dtype in both),
        *(Case("mix", kind, dtype, shape) for kind in ("random", "flip") for dtype in both for shape in short),
        *(Case("mix", kind, dtype, short[-1]) for kind in ("random", "flip") for dtype in ("float16", "float64")),
        *(Case("mix", "random", "float64", shape) for shape in short[:1]),
        *(Case("mix", kind, "uint8", pictures) for kind in ("random", "flip", "channels_last", "to_channels_last")),
        *(Case("mix", kind, dtype, pictures) for kind in ("cut", "cut_flip") for dtype in (*both, "uint8")),
        *(Case("mix", "cut", dtype, short[-1]) for dtype in (*both, "uint8")),
        *(
            Case("mix", kind, "bfloat16", shape)
            for kind, shape in (("cut", odd[0]), ("cut_flip", odd[0]), ("cut", odd[1]))
        ),
        Case("mix", "to_channels_last", "uint8", (256, 3, 16, 16)),
        *(Case("mixed_target", kind, "float32", (256,)) for kind in ("random", "flip")),
        *(Case("mix_backward", "random", dtype, pictures) for dtype in both),
        *(Case("mix_backward", "random", "bfloat16", shape) for shape in short),
        *(Case("mix_backward", "random", "float64", shape) for shape in (short[0], short[-1])),
    ]


def _mixupe_loss(case: Case) -> None:
    n, columns = case.shape
    logits = torch.empty(case.shape, dtype=getattr(torch, case.dtype))
    compute = accumulate_dtype(logits.dtype)
    scalar = torch.empty((), dtype=compute)
    target = (torch.empty(case.shape, dtype=compute), None, None)
    if case.kind in ("mixed", "smoothed"):
        target = (torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=compute))
    tail = (0.1 if case.kind == "smoothed" else 0.0, case.kind == "sigmoid")
    _, *saved = KERNELS["mixupe_loss"](logits, *target, scalar, scalar, n // 2, n // 2, 0, 1.0, True, *tail)
    KERNELS["mixupe_loss_backward"](scalar, logits, *target, *saved, n // 2, 0, *tail)


def _ce_entropy(case: Case) -> None:
    n, columns = case.shape
    logits = torch.empty(case.shape, dtype=getattr(torch, case.dtype))
    labels, weight = torch.empty(n, dtype=torch.int64), torch.empty(columns, dtype=accumulate_dtype(logits.dtype))
    ce, entropy, lse = KERNELS["ce_entropy"](logits, labels, None, None, weight, 0.1)
    KERNELS["ce_entropy_backward"](ce, entropy, lse, logits, entropy, lse, labels, None, None, weight, 0.1)


def _mix(case: Case) -> None:
    dtype = getattr(torch, case.dtype)
    layout = torch.channels_last if case.kind == "channels_last" else torch.contiguous_format
    x, lam = torch.empty(case.shape, dtype=dtype, memory_format=layout), torch.empty((), dtype=accumulate_dtype(dtype))
    partner = None if "flip" in case.kind else torch.empty(case.shape[0], dtype=torch.int64)
    box = torch.empty(4, dtype=torch.int64) if "cut" in case.kind else None
    normalise = torch.empty(3) if case.dtype == "uint8" else None
    out_dtype = torch.bfloat16 if case.dtype == "uint8" else None
    out_layout = torch.channels_last if case.kind == "to_channels_last" else None
    KERNELS["mix"](x, partner, lam, None, normalise, normalise, out_dtype, out_layout, box)


def _mixed_target(case: Case) -> None:
    labels, lam = torch.empty(case.shape, dtype=torch.int64), torch.empty((), dtype=getattr(torch, case.dtype))
    KERNELS["mixed_target"](labels, None if case.kind == "flip" else labels, lam, labels, case.shape[0] // 2)


def _mix_backward(case: Case) -> None:
    n, grad = case.shape[0], torch.empty(case.shape, dtype=getattr(torch, case.dtype))
    index, weight = torch.empty(2 * n, dtype=torch.int64), torch.empty(2 * n, dtype=accumulate_dtype(grad.dtype))
    KERNELS["gather_sum"](grad, index, weight, torch.empty(n + 1, dtype=torch.int64))
    KERNELS["row_dot"](grad, grad, index[:n], index[:n])


CALLS: dict[str, Callable[[Case], None]] = {
    "mixupe_loss": _mixupe_loss,
    "ce_entropy": _ce_entropy,
    "mix": _mix,
    "mixed_target": _mixed_target,
    "mix_backward": _mix_backward,
}


class _NoDevice:
    """What the launcher asks of a driver. Kernels are cached by device, so each target is one."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiled_only(target: GPUTarget) -> Iterator[list]:
    """Within the block every launch compiles its kernel for ``target`` instead; yields (name, kernel, its arguments by name)."""
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs), kwargs))

    active = driver._active
    driver.set_active(_NoDevice(target))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = active


def _resources(kernel) -> tuple[int, int]:
    """(registers, bytes spilled) of a thread, from the machine code."""
    if "amdgcn" in kernel.asm:
        asm = kernel.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", asm, re.MULTILINE)}
        return number["vgpr_count"], number["private_segment_fixed_size"]
    report = aot_code.dump(kernel.asm["cubin"], "--dump-resource-usage")
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return number["REG"], number["STACK"] + number["LOCAL"]


_WIDE = {  # 16-byte accesses, or 32-byte ones where there are (sm_100)
    "ptx": r"\b(?:{})\.global(?:[.\w:]*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)\b|[^;]*, 0x10,)",
    "amdgcn": r"\b(?:global|buffer)_{}_dwordx4\b",
}
_ACCESS = {"ptx": (r"ld|cp\.async\.c[ag]\.shared", "st"), "amdgcn": ("load", "store")}


def compile_case(case: Case, target: str) -> list[Kernel]:
    """The kernels of one case, compiled for one of ``TARGETS``."""
    with compiled_only(TARGETS[target]) as kernels:
        CALLS[case.operator](case)
    rows = []
    for name, kernel, constants in kernels:
        language = "amdgcn" if "amdgcn" in kernel.asm else "ptx"
        loads, stores = (
            len(re.findall(_WIDE[language].format(access), kernel.asm[language])) for access in _ACCESS[language]
        )
        threads, stages = kernel.metadata.num_warps * TARGETS[target].warp_size, kernel.metadata.num_stages
        registers, spilled = _resources(kernel)
        shared = kernel.metadata.shared
        row = Kernel(target, str(case), name, threads, stages, registers, shared, spilled, loads, stores)
        if target in COUNTED_TARGETS and name in COUNTED:
            (code,) = aot_code.functions(aot_code.dump(kernel.asm["cubin"])).values()
            rows_of_block, length = constants.get("ROWS", 1), constants.get("SPAN") or constants["BLOCK"]
            row = counted(row, case, code, rows_of_block * length / threads)
        rows.append(row)
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS / "aot.csv", help="the file to write")
    parser.add_argument("--no-bars", action="store_true", help="do not let the bars set the exit status")
    options = parser.parse_args(arguments)
    jobs = [(case, target) for target in TARGETS for case in cases() if options.only in str(case)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        batches = [*pool.map(compile_case, *zip(*jobs, strict=True), chunksize=8)] if jobs else []
        if not aot_cuda.is_available():
            print("nvcc is not on PATH: no kernel of CUDA C++ is counted")
        elif not options.only or "cuda".startswith(options.only):
            builds = [(source, target) for target in COUNTED_TARGETS for source in ("loss.cu", "mix.cu")]
            batches += pool.map(aot_cuda.compile_rows, *zip(*builds, strict=True))
    kernels = [kernel for batch in batches for kernel in batch]
    write_csv(options.out, kernels, Kernel)
    for target in TARGETS:
        rows = [kernel for kernel in kernels if kernel.target == target]
        spilling = [f"{row.case} {row.kernel} {row.spilled} B" for row in rows if row.spilled]
        most = max((row.registers for row in rows), default=0)
        print(f"{target}: {len(rows)} kernels, at most {most} registers, spilling: {spilling}")
    judged = verdicts(kernels)
    failed = [(bar, kernel) for bar, kernel, met in judged if not met]
    for bar, kernel in failed:
        value = getattr(kernel, bar.field)
        print(
            f"bar not met: {kernel.language} {kernel.target} {kernel.case} {kernel.kernel}: {bar.field} {value}, not {bar.limit}"
        )
    print(f"bars: {len(judged) - len(failed)} of {len(judged)} met")
    print(f"written: {options.out}, {picture(options.out)}")
    return int(bool(failed) and not options.no_bars)
