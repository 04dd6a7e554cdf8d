"""Who is timed in a case, as parameters of a test; a group of pytest-benchmark's is a case."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import pytest
import torch

from mixupe_kernels.ops import backends

from .. import run, workloads
from ..cases import Case, Row

_TINY = {2: (4, 5), 4: (4, 3, 4, 4)}


def _backends(device: str) -> list[str]:
    here = [name for name in backends.backends_for(device) if name in backends.available_backends()]
    return here if device == "cuda" else [backends.serving("cpu")]


@functools.lru_cache(maxsize=1)
def _workload(case: Case, device: str) -> workloads.Workload:
    torch._dynamo.reset()
    return workloads.build(case, device, _backends(device), torch.compile)


def _names(case: Case, device: str) -> Iterable[str]:
    tiny = dataclasses.replace(case, shape=_TINY[len(case.shape)])
    return workloads.build(tiny, device, _backends(device), compiler=lambda function: function).calls


class Contender:
    """One way to do a case, checked against the float64 reference before it is timed."""

    def __init__(self, case: Case, device: str, name: str):
        self.case, self.device, self.name = case, device, name

    def __str__(self) -> str:
        return f"{self.case.label} {self.device} {self.name}".replace(" ", "-")

    def time(self, benchmark) -> None:
        benchmark.group = f"{self.case.label}, {self.device}"
        benchmark.name = self.name
        workload = _workload(self.case, self.device)
        with torch.set_grad_enabled(workload.needs_grad), workloads.backend_context(self.name):
            call, rows = workload.calls[self.name], {self.name: Row(self.case.label, self.name)}
            if not run.checked(workload._replace(calls={self.name: call}), rows):
                pytest.fail(rows[self.name].note)
            benchmark(call, workload.inputs)


def contenders(*cases: Case) -> Callable:
    """Parameters of a test: every contender of every case, on the CPU and on a CUDA device if there is one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = [Contender(case, device, name) for case in cases for device in devices for name in _names(case, device)]
    return pytest.mark.parametrize("contender", found, ids=str)
