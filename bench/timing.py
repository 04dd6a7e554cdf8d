"""Timing on a machine that is shared and noisy: contenders take turns, and only ratios within a turn are compared."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Ratio(NamedTuple):
    """Median of paired ratios of times, with the quartiles."""

    median: float
    low: float
    high: float


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2, min_seconds: float = 2e-3
) -> dict[str, list[float]]:
    """Seconds a call of each contender takes, one figure a round; the order turns by one each round.

    A round repeats each contender until ``min_seconds`` have passed, so that the clock's grain does not show.
    """
    names = list(contenders)
    repeats = {}
    for name in names:
        for _ in range(warmup):
            contenders[name]()
        begin = time.perf_counter()
        contenders[name]()
        repeats[name] = max(1, round(min_seconds / max(time.perf_counter() - begin, 1e-9)))
    times = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, count = contenders[name], repeats[name]
            begin = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - begin) / count)
    return times


def ratio(times: list[float], base: list[float]) -> Ratio:
    """``times`` over ``base``, round by round."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high)
