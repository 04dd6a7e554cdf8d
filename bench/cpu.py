"""``python -m bench cpu``: the operators on this machine's CPU, against eager PyTorch, torch.compile and ``copy_``.

Contenders of a case take turns in one process and only ratios within a turn are compared; every result is checked
against the float64 reference before it is timed.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mixupe_kernels.ops import backends

from . import host, results, run, workloads
from .cases import CPU_CASES, FLOAT32, Case, Row, Verdict
from .timing import interleave, quartiles, ratio

THREADS = 2
TURN_SECONDS = 2e-2  # long enough for a steady state, see timing.interleave


def measure(case: Case, rounds: int, compiler: Callable = torch.compile) -> tuple[list[Row], list[Verdict]]:
    """Check and time every contender of one case."""
    ours = backends.serving("cpu")
    torch._dynamo.reset()
    workload = workloads.build(case, "cpu", [ours], compiler)
    rows = {provider: Row(case.label, provider, bytes_moved=workload.bytes_moved) for provider in workload.calls}
    with torch.set_grad_enabled(workload.needs_grad):
        calls = run.checked(workload, rows)
        timed = {provider: functools.partial(call, workload.inputs) for provider, call in calls.items()}
        times = interleave(timed, rounds=rounds, min_seconds=TURN_SECONDS) if timed else {}
    for provider, seconds in times.items():
        row = rows[provider]
        row.seconds_low, row.seconds, row.seconds_high = quartiles(seconds)
        row.bytes_per_second = workload.bytes_moved / row.seconds
        if ours in times:
            row.speedup, row.speedup_low, row.speedup_high = ratio(seconds, times[ours])
        if provider == FLOAT32:
            row.bytes_moved = row.bytes_per_second = None  # it moves twice the bytes of the case
    return list(rows.values()), run.judge(case, rows, ours, {})


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, under two minutes")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "cpu", help="where results go")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--no-bars", action="store_true", help="exit with 0 whatever the bars say")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    facts = {**results.machine_facts(), "backend": backends.serving("cpu")}
    rows, verdicts = [], []
    for case in CPU_CASES:
        if options.only not in case.label or (options.quick and not case.quick):
            continue
        new_rows, new_verdicts = measure(case, rounds=7 if options.quick else case.rounds)
        rows, verdicts = rows + new_rows, verdicts + new_verdicts
        for row in new_rows:
            print(run.line(row), flush=True)
    if options.only in host.CASE:
        new_rows, new_verdicts = host.measure()
        rows, verdicts = rows + new_rows, verdicts + new_verdicts
        for row in new_rows:
            print(run.line(row), flush=True)
    title = f"{facts['backend']} backend on {facts['device']}, {THREADS} threads, torch {facts['torch']}"
    run.finish(options.out, facts, rows, verdicts, title)
    return run.exit_status(verdicts, options.no_bars)
