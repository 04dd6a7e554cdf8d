"""How long each benchmark runs, and CUDA's clock."""

import pytest
import torch

THREADS = min(2, torch.get_num_threads())
SECONDS = 0.4  # of each: all of them in less than four minutes


class EventClock:
    """Seconds by events of the current CUDA stream, as pytest-benchmark asks for them: a call lasts from one to the next."""

    def __init__(self):
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record()

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self._start.elapsed_time(now) / 1e3


def pytest_collection_modifyitems(items):
    clock = EventClock() if torch.cuda.is_available() else None
    for item in items:
        options = {"max_time": SECONDS, "min_rounds": 5, "warmup": True, "warmup_iterations": 20}
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(getattr(parameter, "device", "cpu") == "cuda" for parameter in parameters):
            options["timer"] = clock
        item.add_marker(pytest.mark.benchmark(**options))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
