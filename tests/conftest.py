"""Fixtures shared by all tests: which backends there are to test, and the comparison every backend is held to.

A process serves the reference, the compiled backend and the emulated one, and on a machine with a CUDA device that device's
backends. With TRITON_INTERPRET=1 in its environment, which Triton looks at once as it is imported, it serves interpreted
Triton alone. MIXUPE_THOROUGH=1 gives slow backends every case.
"""

import contextlib
import os
from typing import NamedTuple

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels.ops import backends

torch.set_num_threads(2)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
THOROUGH = os.environ.get("MIXUPE_THOROUGH") == "1"
FOR_DEVICES = ("triton", "cuda_emulated")  # backends whose kernels the CPU only tests


class Served(NamedTuple):
    """A backend to test, and the device its tensors are on."""

    name: str
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    @property
    def slow(self) -> bool:
        """Whether it takes less than the whole suite: Triton interprets each program, or compiles each shape, and an
        emulated device has one thread after the other."""
        return self.name in FOR_DEVICES and not THOROUGH

    @property
    def refuses(self) -> bool:
        """Whether it says at once which value is out of range. Triton marks what it cannot read with NaN
        (test_triton_interpreter.py), and a device asserts (test_emulated.py)."""
        return self.name not in FOR_DEVICES and self.device == "cpu"


ON_CPU = [Served(name) for name in backends.backends_for("cpu") if (name == "triton") == INTERPRETED]
ON_CUDA = [Served(name, "cuda") for name in backends.backends_for("cuda") if name != "reference"]
ON_CUDA = ON_CUDA if torch.cuda.is_available() and not INTERPRETED else []


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device (`python -m bench gpu` runs these)")
    config.addinivalue_line("markers", "thorough: left out where a backend is slow")
    config.addinivalue_line("markers", "for_devices: looks at what only backends for devices do")
    config.addinivalue_line("markers", "host: needs CPU tensors (values are refused there, or NumPy looks at them)")
    config.addinivalue_line(
        "markers", "by_torch: devices have PyTorch's kernels for it, which on the CPU are the reference"
    )
    config.addinivalue_line("markers", "refuses: needs a backend that refuses values out of range at once")
    if INTERPRETED:
        # Arithmetic on -∞ and NaN is guarded, so NumPy, which the interpreter computes with, has nothing to warn about.
        config.addinivalue_line("filterwarnings", "error::RuntimeWarning")


def unfit(item) -> bool:
    """Whether a test is not for the backend it has been given."""
    served = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if not isinstance(served, Served):
        return False
    return bool(
        (served.slow and item.get_closest_marker("thorough"))
        or (served.device == "cpu" and served.name not in FOR_DEVICES and item.get_closest_marker("for_devices"))
        or (served.device != "cpu" and item.get_closest_marker("host"))
        or (served.device == "cpu" and served.name in FOR_DEVICES and item.get_closest_marker("by_torch"))
        or (not served.refuses and item.get_closest_marker("refuses"))
    )


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if unfit(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@contextlib.contextmanager
def unwritten_is_nan():
    """torch fills what ``torch.empty`` returns with NaN in this mode: an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def why_missing(name: str) -> str:
    """Why a backend cannot be used here; nothing if it can."""
    try:
        with mk.use_backend(name):
            return ""
    except ValueError as error:
        return str(error)


@contextlib.contextmanager
def serve(served: Served):
    """Run operators on the backend, with its device as the default one; skip where it is not available."""
    if reason := why_missing(served.name):
        pytest.skip(reason)
    place = torch.device(served.device) if served.device != "cpu" else unwritten_is_nan()
    with mk.use_backend(served.name), place:
        yield served.name


@pytest.fixture(params=ON_CPU, ids=str)
def backend(request):
    """The name of each CPU backend in turn, in use."""
    with serve(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
