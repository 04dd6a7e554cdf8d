"""csrc/emulate, the CUDA kernels on the host: the order of threads and blocks changes no bit, and what is wrong is seen.

tests/ops runs the operators on it. MIXUPE_THOROUGH=1 adds builds of the whole library under ThreadSanitizer.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk

from .conftest import INTERPRETED, THOROUGH, Served, serve
from .emulated_calls import CALLS, results

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
EMULATED = Served("cuda_emulated")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing here is Triton's")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


@pytest.fixture
def emulated():
    with serve(EMULATED):
        yield


@pytest.mark.parametrize("name", CALLS)
def test_the_order_of_threads_and_blocks_changes_no_bit(emulated, monkeypatch, name):
    expected = [part.nan_to_num(nan=1e30) for part in results(name)]
    assert expected
    for order in ("reverse", "1", "2"):
        monkeypatch.setenv("MIXUPE_EMULATED_ORDER", order)
        for index, (one, other) in enumerate(zip(expected, results(name), strict=True)):
            assert torch.equal(one, other.nan_to_num(nan=1e30)), (order, index)


EARLY = """
import ctypes, pickle, sys
import torch
import mixupe_kernels as mk
from mixupe_kernels.ops import backends
from tests.emulated_calls import CALLS, results

with mk.use_backend("cuda_emulated"):
    found = [part for name in CALLS for part in results(name)]
count = ctypes.CDLL(str(backends._PACKAGE / "_cuda_emulated.so")).mixupe_emulated_early_launches
torch.save((count(), found), sys.argv[1])
"""


def test_kernels_launched_early_wait_and_give_the_same(emulated, tmp_path):
    """In a process of its own: the environment is read at the first launch. A thread that does not wait is an error."""
    counts = []
    for asked in ("1", "0"):
        environment = {**os.environ, "MIXUPE_DEPENDENT_LAUNCH": asked, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", EARLY, tmp_path / "found.pt"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        count, found = torch.load(tmp_path / "found.pt")
        counts.append(count)
        expected = [part for name in CALLS for part in results(name)]
        assert len(found) == len(expected)
        assert all(torch.equal(a.nan_to_num(nan=7), b.nan_to_num(nan=7)) for a, b in zip(found, expected, strict=True))
    assert counts[0] >= 2 * len(CALLS) and counts[1] == 0


def refused():
    ops, z, x, half = torch.ops.mixupe, torch.randn(3, 4), torch.randn(3, 5), torch.full((3,), 0.5)
    rows, far = torch.arange(3), torch.tensor([0, 1, 3])
    return {
        "labels must be": lambda: ops.ce_entropy(z, torch.tensor([0, 4, 1])),
        "lam must be": lambda: ops.ce_entropy(z, rows, rows, half + 1),
        "partner, rows and index": lambda: ops.mix(x, far, half),
        "rows and index must be rows": lambda: ops.mixed_target(rows, rows, half, far, 3),
        "offsets must": lambda: ops.gather_sum(x, rows, half, torch.tensor([0, 2, 1, 3])),
        "lam must be in": lambda: ops.mix(x, rows, half * torch.nan),
    }


@pytest.mark.parametrize("message", refused())
def test_an_assert_of_a_device_is_an_error(emulated, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        refused()[message]()
    z = torch.randn(3, 4)
    torch.testing.assert_close(
        mk.ce_entropy(z, torch.arange(3)).ce, torch.nn.functional.cross_entropy(z, torch.arange(3), reduction="none")
    )


KERNELS = r"""
#include <cassert>
#include <cstdio>
#include <cstring>
#include <exception>
#include "cuda_runtime.h"
#include "team.h"

using mixupe::Team, mixupe::from_first_lane;

__global__ void reduces_twice(float* out) {
  const auto add = [](float a, float b) { return a + b; };
  float sum = float(threadIdx.x);
  for (int i = 0; i < 2; ++i) sum = Team<256>::reduce(sum, add);
  out[blockIdx.x * 256 + threadIdx.x] = sum;
}
// Threads take their neighbour's value, then write it over that of another.
template <typename Team>
__device__ void turns(float* out) {
  float* own = out + blockIdx.x * 256 + threadIdx.x - Team::rank();
  own[Team::rank()] = float(Team::rank());
  Team::sync();
  const float next = own[(Team::rank() + 1) % Team::threads];
  Team::sync();
  own[Team::rank()] = next;
}
__global__ void blocks_take_turns(float* out) { turns<Team<256>>(out); }
__global__ void warps_take_turns(float* out) { turns<Team<32>>(out); }
__global__ void asserts(float* out) {
  assert(threadIdx.x != 70 && "not this thread");
  *out = 1;
}
__global__ void shuffles_without_a_lane(float* out) {
  if (threadIdx.x != 33) out[threadIdx.x] = from_first_lane(1.f);
}
__global__ void waits_at_two_places(float* out) {
  if (threadIdx.x < 8) __syncthreads();
  else out[threadIdx.x] = from_first_lane(1.f);
}
__global__ void barrier_without_those_who_are_done(float* out) {
  if (threadIdx.x >= 100) return;
  __syncthreads();
  out[blockIdx.x * 256 + threadIdx.x] = 1;
}
__global__ void does_not_wait(float* out) { *out = 1; }
__global__ void threads_write_one_place(float* out) { *out = float(threadIdx.x); }
__global__ void blocks_write_one_place(float* out) {
  if (threadIdx.x == 0) *out = float(blockIdx.x);
}

int main(int, char** arguments) {
  static float out[2 * 256];
  const auto run = [&](const char* name, void (*kernel)(float*)) {
    if (std::strcmp(name, arguments[1])) return;
    cudaLaunchConfig_t config;
    config.gridDim.x = 2, config.blockDim.x = 256;
    cudaLaunchAttribute early{cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
    config.attrs = &early, config.numAttrs = !std::strcmp(name, "does_not_wait");
    cudaLaunchKernelEx(&config, kernel, out);
  };
#define RUN(kernel) run(#kernel, kernel)
  try {
    RUN(reduces_twice), RUN(asserts), RUN(shuffles_without_a_lane), RUN(waits_at_two_places);
    RUN(blocks_take_turns), RUN(warps_take_turns), RUN(barrier_without_those_who_are_done), RUN(does_not_wait), RUN(threads_write_one_place), RUN(blocks_write_one_place);
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
  std::printf("%g %g\n", out[0], out[511]);
}
"""

SANITIZED = ["-fsanitize=thread", "-std=c++17", "-O1", "-g1", "-pthread"]
EMULATION = ROOT / "csrc" / "emulate"
BARRIER = re.compile(r"__sync(?:threads|warp)\([^)]*\);")
# The barriers of team.h in their order: the kernel of KERNELS that needs each.
BARRIERS = ("reduces_twice", "reduces_twice", "blocks_take_turns", "warps_take_turns")


def without_barrier(text: str, index: int) -> str:
    """The source without one of its barriers."""
    found = list(BARRIER.finditer(text))
    assert len(found) == len(BARRIERS)
    return text[: found[index].start()] + ";" + text[found[index].end() :]


def compiled(*arguments) -> None:
    done = subprocess.run([COMPILER, *SANITIZED, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """KERNELS built under ThreadSanitizer, and with one barrier less each: the paths of the programs."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cu").write_text(KERNELS)
    compiled("-fno-sanitize=thread", "-U_FORTIFY_SOURCE", "-c", EMULATION / "blocks.cpp", "-o", folder / "blocks.o")
    text = (ROOT / "csrc/cuda/team.h").read_text()
    built = []
    for name, header in [("all", text), *((str(i), without_barrier(text, i)) for i in range(len(BARRIERS)))]:
        (folder / name).mkdir()
        (folder / name / "team.h").write_text(header)
        program = folder / name / "program"
        compiled(
            "-I",
            folder / name,
            "-I",
            EMULATION,
            "-x",
            "c++",
            folder / "kernels.cu",
            "-x",
            "none",
            folder / "blocks.o",
            "-o",
            program,
        )
        built.append(program)
    return built


def sanitized(*command, cwd=ROOT, **variables):
    """(What a program wrote, whether ThreadSanitizer reported a race)."""
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []  # or some runtimes find no room
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TSAN_OPTIONS": "atexit_sleep_ms=0", **variables}
    done = subprocess.run([*fixed, *command], capture_output=True, text=True, env=variables, cwd=cwd)
    assert done.returncode in (0, 1, 66), done.stderr
    return done.stdout.strip(), "ThreadSanitizer: data race" in done.stderr


def run(program, kernel, order="forward"):
    return sanitized(program, kernel, MIXUPE_EMULATED_ORDER=order)


@needs_compiler
def test_kernels_without_a_race_have_none_reported(programs):
    for order in ("forward", "reverse", "3"):
        assert run(programs[0], "reduces_twice", order) == (f"{255 * 128 * 256:g} {255 * 128 * 256:g}", False)
        for kernel, last in (("blocks_take_turns", 0), ("warps_take_turns", 0)):
            assert run(programs[0], kernel, order) == (f"1 {last}", False)
        assert run(programs[0], "barrier_without_those_who_are_done", order) == ("1 0", False)


@needs_compiler
@pytest.mark.parametrize("index", range(len(BARRIERS)))
def test_a_deleted_barrier_is_a_race(programs, index):
    assert run(programs[1 + index], BARRIERS[index])[1]


@needs_compiler
def test_races_are_reported_between_threads_and_between_blocks(programs):
    assert run(programs[0], "threads_write_one_place", "reverse") == ("0 0", True)
    assert run(programs[0], "blocks_write_one_place", "forward") == ("1 0", True)
    assert run(programs[0], "blocks_write_one_place", "reverse") == ("0 0", True)


@needs_compiler
@pytest.mark.parametrize(
    "kernel, message",
    [
        ("asserts", 'error: device-side assert: threadIdx.x != 70 && "not this thread"'),
        ("shuffles_without_a_lane", "error: the threads of block 0 wait for ever: 32 at a shuffle, 34 at a shuffle"),
        ("does_not_wait", "error: a thread of an early launch has not waited for the kernels before it"),
        ("waits_at_two_places", "error: the threads of block 0 wait for ever: 0 at __syncthreads, 1 at __syncthreads"),
    ],
)
def test_what_would_hang_or_trap_is_an_error(programs, kernel, message):
    assert run(programs[0], kernel)[0].startswith(message)


# What is changed in a copy of csrc/cuda, and whether that is a race or leaves elements unwritten.
MUTANTS = {
    "none": ("team.h", "", "", False, False),
    "a barrier less": ("team.h", "__syncthreads();", "", True, None),  # which may give any number, or an error
    "labels not written last": ("backward.h", "Team::sync();  // the labels' columns", "//", True, None),
    "a part less": ("loss.cu", "grid{job.rows, cut.parts}", "grid{job.rows, cut.parts - 1}", False, True),
    "a block less": ("tiling.h", "return samples * tiles;", "return samples * tiles - 1;", False, True),
}


@needs_compiler
@pytest.mark.skipif(not THOROUGH, reason="builds the whole library under ThreadSanitizer: MIXUPE_THOROUGH=1")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_library_has_no_race_and_writes_every_element(tmp_path, mutant):
    file, old, new, race, unwritten = MUTANTS[mutant]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    shutil.copytree(Path(mk.__file__).parent, tmp_path / "mixupe_kernels")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new, 1))
    tsan = subprocess.run([COMPILER, "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    for command in (
        ["-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", "-DCMAKE_CXX_FLAGS=-fsanitize=thread", "-DMIXUPE_BINDINGS=OFF",
         f"-DPython_EXECUTABLE={sys.executable}"],
        ["--build", tmp_path / "build", "--target", "_cuda_emulated"],
    ):  # fmt: skip
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    program = [sys.executable, "-m", "tests.emulated_calls"]
    written, reported = sanitized("env", f"LD_PRELOAD={tsan}", *program, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert reported == race
    if unwritten is not None:
        assert len(written.splitlines()) == len(CALLS), written
        assert ("nan" in written) == unwritten, written
