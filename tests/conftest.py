"""Fixtures shared by all tests: which backends there are to test, and the comparison every backend is held to."""

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels.ops import backends

torch.set_num_threads(2)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device (`python -m bench gpu` runs these)")


@pytest.fixture(params=[name for name in backends.backends_for("cpu") if name != "triton"])
def backend(request):
    """Each CPU backend in turn. The Triton kernels have the same cases in test_triton_interpreter.py."""
    if request.param not in mk.available_backends():
        pytest.skip(f"backend {request.param} is not available: {backends.missing_backends().get(request.param)}")
    with mk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
