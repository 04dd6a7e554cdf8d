"""Loops of libraries in float64, followed."""

import pytest
import torch

from .formula import Followed


@pytest.fixture
def float64():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small networks: a second thread waits for the first, and for other tests
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture
def followed(monkeypatch, float64):
    """The first ten losses and batches of what runs are compared with the formula, to 1e-12."""
    return Followed(monkeypatch)
