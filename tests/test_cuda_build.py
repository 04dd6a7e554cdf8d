"""The CUDA sources compiled for GPUs that are not here: no warning, no register spilled to memory, wide loads.

nvcc needs no GPU, and the sources no more of torch than the stable ABI's headers, which a CPU-only torch has too.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk

from .conftest import THOROUGH

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
CAPABILITIES = (80, 90, 100) if THOROUGH else (90,)  # 15 s of CPU time each; `make test-matrix LEG=emulation` has all
NVCC = shutil.which("nvcc")
LIBRARY = Path(mk.__file__).parent / "_cuda.so"

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.name)
def build(request, tmp_path_factory):
    """(source, what nvcc said of its build for each capability, the PTX for sm_90), with the flags of CMakeLists.txt."""
    source, folder = request.param, tmp_path_factory.mktemp("cuda")
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in CAPABILITIES]
    command = [
        NVCC, "-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas", "-Xptxas=-v", "--threads=2",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", Path(torch.__file__).parent / "include",
        *architectures, "--keep", "--keep-dir", folder, "-c", source, "-o", folder / "out.o",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    # Files are named by the capability if there are several.
    (ptx,) = folder.glob("*compute_90*.ptx" if THOROUGH else "*.ptx")
    return source, done.stdout, ptx.read_text()


def test_compiles_without_warnings(build):
    _, log, _ = build
    assert "warning" not in log.lower(), log


def test_no_kernel_spills(build):
    source, log, _ = build
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    kernels = len(re.findall(r"Compiling entry function", log))
    assert len(spills) >= kernels >= len(CAPABILITIES), source
    assert {tuple(map(int, spill)) for spill in spills} == {(0, 0, 0)}


def test_every_kernel_is_built_for_every_capability(build):
    source, log, _ = build
    built = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", log)
    names = {capability: {name for name, sm in built if sm == capability} for capability in map(str, CAPABILITIES)}
    first, *others = (len(kernels) for kernels in names.values())
    assert first > 0 and all(other == first for other in others), source
    text = source.read_text()
    for header in re.findall(r'#include "(\w+\.h)"', text):
        text += (source.parent / header).read_text()
    declared = set(re.findall(r"__global__ void __launch_bounds__\(.*\) (\w+)\(", text))
    assert declared
    for kernels in names.values():
        assert all(any(kernel in name for name in kernels) for kernel in declared)


def test_rows_are_read_16_bytes_at_a_time(build):
    source, _, ptx = build
    kernels = re.split(r"\.entry ", ptx)[1:]
    assert kernels, source
    for kernel in kernels:
        name = kernel.split("(", 1)[0]
        if any(part in name for part in ("total_loss", "join_parts", "write_rows", "mix_rowsIh", "flip_rowsIh")):
            continue  # the first three take a few values a row; uint8 is read 8 bytes at a time
        assert re.search(r"ld\.global\.v(4\.\w32|2\.\w64)", kernel), name


def test_every_kernel_waits_before_it_looks_at_memory(build):
    """For the kernels before it, where it may be launched early: sm_90 and later."""
    source, _, ptx = build
    for kernel in re.split(r"\.entry ", ptx)[1:]:
        first = re.search(r"griddepcontrol\.wait|\b(ld|st)\.global|\b(ld|st)\.(?!param)", kernel)
        assert first and first[0] == "griddepcontrol.wait", (source, kernel.split("(", 1)[0])


# A leg of the matrix that builds by a CUDA build of torch must have it.
@pytest.mark.skipif(
    not LIBRARY.exists() and os.environ.get("MIXUPE_CUDA_BUILT") != "1",
    reason="the package was built by a CPU build of torch, which has nothing to link _cuda.so with",
)
def test_the_library_loads():
    """Where there is no device, the package does not load it by itself."""
    load = f"import torch, mixupe_kernels; torch.ops.load_library({str(LIBRARY)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
