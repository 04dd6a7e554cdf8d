"""Timing on a machine that is shared and noisy: contenders take turns, and only ratios within a turn are compared."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """Median of paired ratios of times, with the quartiles."""

    median: float
    low: float
    high: float

    def standard_error(self, count: int) -> float:
        """That of the median of ``count`` ratios: 1.25·σ/√count with σ = (quartiles' distance)/1.35, for normal ones (McGill,
        Tukey and Larsen, 1978, p. 16), times √(4/3), because two in a row share a turn of the base (``interleave_with``),
        which gives them a correlation of 1/6. That is too much where turns of others come between. Of 11 ratios it is known
        to about a quarter of itself; of fewer than 5 it is NaN."""
        if count < 5:
            return math.nan
        return 1.25 / 1.35 * (4 / 3) ** 0.5 * (self.high - self.low) / count**0.5


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round, the same in every run: drawn for each, so that no contender always follows the same other one,
    which made of two that do the same work one 2 % slower."""
    source = random.Random(0)
    for _ in range(rounds):
        yield source.sample(names, len(names))


def turns_of(
    contenders: dict[str, Callable[[], object]],
    warmup: int,
    min_seconds: float,
    clock: Callable[[], float] | None = None,
) -> dict[str, Callable[[], float]]:
    """What takes a turn of each contender and returns the seconds of a call, by ``clock`` (``time.perf_counter``).

    A turn repeats it until ``min_seconds`` have passed, so that the clock's grain does not show. Short calls open their turn
    untimed, a quarter of it: the contender before has left the caches and the heap in its own state, which made a 0.1 ms
    call up to three times as slow.
    """

    clock = clock or time.perf_counter

    def prepare(call: Callable[[], object]) -> Callable[[], float]:
        for _ in range(warmup):
            call()
        begin = clock()
        call()
        count = max(1, round(min_seconds / max(clock() - begin, 1e-9)))

        def turn() -> float:
            for _ in range((count + 2) // 4):
                call()
            begin = clock()
            for _ in range(count):
                call()
            return (clock() - begin) / count

        return turn

    return {name: prepare(call) for name, call in contenders.items()}


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2, min_seconds: float = 2e-3
) -> dict[str, list[float]]:
    """Seconds a call of each contender takes, one figure a round."""
    turns = turns_of(contenders, warmup, min_seconds)
    times = {name: [] for name in contenders}
    for order in orders(list(contenders), rounds):
        for name in order:
            times[name].append(turns[name]())
    return times


class Pairs(NamedTuple):
    """Seconds a call of a contender takes, one figure a turn, and those of the base at the same time."""

    seconds: list[float]
    base: list[float]


def interleave_with(
    base: str,
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    min_seconds: float = 2e-3,
    turns_a_round: Mapping[str, int] = MappingProxyType({}),
    clock: Callable[[], float] | None = None,
) -> dict[str, Pairs]:
    """The figures of each contender beside ``base``, which has a turn before and after each turn of another: of these two
    the mean. Beside itself it has the mean of a round. For calls so long that the machine's speed changes within a round.

    A contender has one turn a round, or as many as ``turns_a_round`` says. ``clock`` is ``time.perf_counter``, or
    ``time.process_time`` where other processes would take turns too.
    """
    turns = turns_of(contenders, warmup, min_seconds, clock)
    pairs = {name: Pairs([], []) for name in contenders}
    names = [name for name in contenders if name != base for _ in range(turns_a_round.get(name, 1))]
    for order in orders(names, rounds):
        of_base = [turns[base]()]
        for name in order:
            pairs[name].seconds.append(turns[name]())
            of_base.append(turns[base]())
            pairs[name].base.append(statistics.mean(of_base[-2:]))
        for values in pairs[base]:
            values.append(statistics.mean(of_base))
    return pairs


def ratio(times: list[float], base: list[float]) -> Ratio:
    """``times`` over ``base``, round by round."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, median, high = quartiles(ratios)
    return Ratio(median, low, high)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, median, high


# On a device ----------------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """One call for each of the rotating buffers, and what the calls have to run in (a backend switched on)."""

    calls: list[Callable[[], object]]
    context: Callable[[], AbstractContextManager]


class Figures(NamedTuple):
    """Seconds a call, one figure a round: between graph replays (empty without a graph), in a stream, on the host."""

    kernel: list[float]
    stream: list[float]
    enqueue: list[float]


class CudaTimer:
    """The three figures on the current CUDA device, of calls that rotate over buffers larger than its L2."""

    # Calls in a row for the stream and host figures: eager's 40 launches a call stay within the 1024 that a stream
    # queues, beyond which the host waits and its figure would be the device's.
    stream_calls = 16

    def __init__(self):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cold_bytes = 4 * properties.L2_cache_size

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, calls: list[Callable[[], object]], pool: object) -> Callable[[], object]:
        """A CUDA graph of all calls; their results stay alive, so that writes rotate over buffers too.

        Graphs of one ``pool`` share the memory of what they free: they replay one after the other, and each writes
        its temporaries before it reads them.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            results = [call() for call in calls]

        def replay() -> list[object]:
            graph.replay()
            return results

        return replay

    def pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def time(self, calls: list[Callable[[], object]]) -> tuple[float, float]:
        """(seconds on the device, seconds on the host until the last call was issued), of all calls together."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        host = time.perf_counter()
        begin.record()
        for call in calls:
            call()
        host = time.perf_counter() - host
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, host

    def launches(self, call: Callable[[], object]) -> int:
        """Kernels, copies and fills that one call puts on the device."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        # torch.compile annotates its regions, and annotations show on the device's timeline too.
        return sum(not getattr(event, "is_user_annotation", False) for event in on_device)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that one call holds at most, its results included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class HostTimer:
    """Stands in for CudaTimer where a dry run walks the same path without a device; its figures mean nothing."""

    stream_calls = 1
    cold_bytes = 1 << 12

    def synchronize(self) -> None:
        pass

    def capture(self, calls: list[Callable[[], object]], pool: object) -> Callable[[], object]:
        def replay() -> None:
            for call in calls:
                call()

        return replay

    def pool(self) -> object:
        return None

    def time(self, calls: list[Callable[[], object]]) -> tuple[float, float]:
        begin = time.perf_counter()
        for call in calls:
            call()
        seconds = time.perf_counter() - begin
        return seconds, seconds

    def launches(self, call: Callable[[], object]) -> None:
        call()

    def peak_bytes(self, call: Callable[[], object]) -> None:
        call()

    def clear(self) -> None:
        gc.collect()


def interleave_on_device(
    timer: CudaTimer | HostTimer,
    contenders: dict[str, Contender],
    rounds: int,
    failed: Callable[[str, Exception], None],
    min_seconds: float = 4e-3,
) -> dict[str, Figures]:
    """The three figures of each contender.

    A contender whose calls cannot be captured in a graph is reported to ``failed`` and has no kernel figure; the rest
    of its figures stand.
    """
    pool, replays, figures = timer.pool(), {}, {}
    for name, (calls, context) in contenders.items():
        figures[name] = Figures([], [], [])
        try:
            with context():
                replay = timer.capture(calls, pool)
                once, _ = timer.time([replay])
            replays[name] = [replay] * max(1, min(round(min_seconds / max(once, 1e-9)), 100))
        except Exception as error:  # whatever a library's capture raises
            failed(name, error)
    names = list(contenders)
    for order in orders(names, rounds):
        for name in order:
            calls, context = contenders[name]
            row = [calls[index % len(calls)] for index in range(timer.stream_calls)]
            with context():
                if name in replays:
                    seconds, _ = timer.time(replays[name])
                    figures[name].kernel.append(seconds / len(replays[name]) / len(calls))
                row[0]()
                seconds, host = timer.time(row)
            figures[name].stream.append(seconds / len(row))
            figures[name].enqueue.append(host / len(row))
    return figures
