"""The kernels of csrc/cuda compiled to machine code by nvcc, which needs no GPU, for ``bench aot``."""

import dataclasses
import itertools
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from . import aot_code
from .aot_table import Case, Kernel, counted

SOURCES = Path(__file__).parents[1] / "csrc/cuda"


class Compiled(NamedTuple):
    """A kernel: its name with template arguments, resources of a thread or block, and code."""

    name: str
    registers: int
    shared: int
    spilled: int
    code: list[aot_code.Instruction]


def is_available() -> bool:
    return shutil.which("nvcc") is not None


def compile_source(source: str, target: str) -> list[Compiled]:
    """All kernels of a file of csrc/cuda, with the flags of CMakeLists.txt."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [
            "nvcc", "-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-isystem", Path(torch.__file__).parent / "include", f"-arch={target}", "-cubin",
            SOURCES / source, "-o", cubin,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        code, usage = aot_code.functions(aot_code.dump(cubin)), aot_code.dump(cubin, "--dump-resource-usage")
    kernels = []
    for name, text in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        spilled = number["STACK"] + number["LOCAL"]
        kernels.append(Compiled(_readable(name), number["REG"], number["SHARED"], spilled, code[name]))
    return kernels


def _readable(mangled: str) -> str:
    """``forward_rows<Team<256>, false, BFloat16>`` of its mangled name."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"mixupe::(\(anonymous namespace\)::)?", "", name.removeprefix("void "))
    return name.rsplit("(", 1)[0].strip()


# C++'s variants: file, pattern of the kernel's name, the cases they serve, and into how many parts a sample is cut there.
CUDA = (
    ("loss.cu", "(forward|backward)_rows<Team<32>, false, {}>", "mixupe_loss", "mixed", (4096, 1000), 1),
    ("loss.cu", "(forward|backward)_rows<Team<256>, false, {}>", "mixupe_loss", "mixed", (1024, 21841), 1),
    ("loss.cu", "(forward|backward)_parts<Team<256>, false, {}>", "mixupe_loss", "mixed", (64, 128256), 4),
    ("mix.cu", "mix_aligned<false, {}, .*, 1>", "mix", "random", (256, 3, 224, 224), 1),
    ("mix.cu", "mix_aligned<true, {}, .*, 1>", "mix", "flip", (256, 3, 224, 224), 1),
    ("mix.cu", "mix_aligned<false, {}, .*, 3>", "mix", "channels_last", (256, 3, 224, 224), 1),
    ("mix.cu", "mix_aligned<true, {}, .*, 3>", "mix", "channels_last_flip", (256, 3, 224, 224), 1),
)
THREADS = {"Team<32>": 128, ", 3>": 192}  # of a block, by what is in the kernel's name; 256 of the others
CUDA_NAMES = {
    "float32": "float",
    "bfloat16": "BFloat16",
    "float16": "Half",
    "float64": "double",
    "uint8": "unsigned char",
}


def compile_rows(source: str, target: str) -> list[Kernel]:
    """The kernels of CUDA C++ as rows: those that serve a case of ``CUDA``, and any other that spills."""
    rows = []
    for kernel in compile_source(source, target):
        threads = next((count for part, count in THREADS.items() if part in kernel.name), 256)
        base = Kernel(
            target, source, kernel.name, threads, 1, kernel.registers, kernel.shared, kernel.spilled,
            sum(i.is_wide("LDG") and i.width >= 16 for i in kernel.code),
            sum(i.is_wide("STG") and i.width >= 16 for i in kernel.code), "cuda",
        )  # fmt: skip
        served = []
        for (file, pattern, operator, kind, shape, parts), (dtype, cpp) in itertools.product(CUDA, CUDA_NAMES.items()):
            known = dtype != "uint8" or operator == "mix"
            if known and file == source and re.fullmatch(pattern.format(cpp), kernel.name):
                case = Case(operator, kind, dtype, shape)
                row = dataclasses.replace(base, case=str(case))
                team = 32 if "Team<32>" in kernel.name else 256
                work = math.prod(shape[1:]) / parts / team if operator != "mix" else 1  # which has no loop
                served.append(counted(row, case, kernel.code, work))
        rows += served or ([base] if kernel.spilled else [])
    return rows
