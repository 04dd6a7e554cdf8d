"""What the CPU and the GPU run share: check each contender before it is timed, judge the bars, show progress."""

from collections.abc import Callable
from pathlib import Path

from . import plot, results, workloads
from .cases import AT_MOST, COPY_RATE, ENQUEUE, LAUNCHES, READ_RATE, Case, Row, Verdict


def checked(workload: workloads.Workload, rows: dict[str, Row]) -> dict[str, Callable[[tuple], object]]:
    """The contenders whose results are right; what is wrong with the others goes into their rows.

    Each works on a copy, as some libraries write into their inputs (timm mixes in place, Liger's gradient takes the
    place of the logits).
    """
    right = {}
    for provider, call in workload.calls.items():
        try:
            with workloads.backend_context(provider):
                outputs = call(workloads.copies(workload.inputs, 2)[1])
            rows[provider].error = workload.check(provider, workload.inputs, outputs)
            right[provider] = call
        except Exception as error:  # a contender that fails is recorded and the run goes on
            rows[provider].note = failure(error)
    return right


def failure(error: Exception) -> str:
    """One line that says what went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def judge(case: Case, rows: dict[str, Row], ours: str, ceilings: dict[str, float]) -> list[Verdict]:
    """How ``ours`` did against each bar of the case; ``ceilings`` are the rates measured in the same run, bytes/s."""
    verdicts = []
    for against, bar in case.bars:
        measured = _measured(against, rows, rows[ours], ceilings)
        met = None if measured is None else measured <= bar if against in AT_MOST else measured >= bar
        verdicts.append(Verdict(case.label, against, bar, measured, met))
    return verdicts


def _measured(against: str, rows: dict[str, Row], own: Row, ceilings: dict[str, float]) -> float | None:
    if against in (COPY_RATE, READ_RATE):
        known = own.bytes_per_second is not None and against in ceilings
        return own.bytes_per_second / ceilings[against] if known else None
    if against == ENQUEUE:
        return None if own.enqueue_seconds is None else own.enqueue_seconds * 1e6
    if against == LAUNCHES:
        return own.launches
    return rows[against].speedup if against in rows else None


def line(row: Row, dry: bool = False) -> str:
    """A row as progress is shown; of a dry run, only what it proves."""
    if row.seconds is None and row.stream_seconds is None:
        return f"{row.case:44} {row.provider:16} {row.note}"
    if dry:
        return f"{row.case:44} {row.provider:16} right within {row.error:.1e}  {row.note}".rstrip()
    figures = [
        text.format(value * scale)
        for text, value, scale in (
            ("{:10.3f} ms", row.seconds, 1e3),
            ("stream {:9.3f} ms", row.stream_seconds, 1e3),
            ("enqueue {:7.1f} µs", row.enqueue_seconds, 1e6),
            ("{:7.0f} GB/s", row.bytes_per_second, 1e-9),
            ("{:7.2f}× ours", row.speedup, 1),
        )
        if value is not None
    ]
    return f"{row.case:44} {row.provider:16} {'  '.join(figures)}  {row.note}".rstrip()


def finish(directory: Path, facts: dict[str, object], rows: list[Row], verdicts: list[Verdict], title: str) -> None:
    """Write the files and the pictures, then the table, which comes last on stdout."""
    results.write(directory, facts, rows, verdicts)
    plot.speedups(directory, f"{title}, {facts['date']}")
    if any(row.provider in (COPY_RATE, READ_RATE) for row in rows):
        plot.roofline(directory, f"{title}, {facts['date']}")
    print(f"results in {directory}")
    results.print_table(title, verdicts)


def exit_status(verdicts: list[Verdict], no_bars: bool) -> int:
    """1 if a bar was missed; one that could not be measured says nothing."""
    return int(not no_bars and any(verdict.met is False for verdict in verdicts))
