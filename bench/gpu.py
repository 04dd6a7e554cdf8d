"""``python -m bench gpu``: the GPU tests, then the operators on this machine's GPU against the copy rate and peers.

Three figures each: ``seconds``, the kernel figure, by replaying a CUDA graph of calls that rotate over buffers larger
than the L2 cache; the same calls in a stream; and the host's time to issue one. ``--dry-run`` walks the whole path on a
CPU, at small sizes under Triton's interpreter: every case built, every contender checked, all files and pictures
written; its figures mean nothing and are marked so.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import mixupe_kernels as mk
from mixupe_kernels.ops import backends

from . import results, run, workloads
from .cases import GPU_CASES, Case, Row, Verdict
from .timing import Contender, CudaTimer, Figures, HostTimer, interleave_on_device, quartiles, ratio

ROOT = Path(__file__).parents[1]
TESTS, TEST_PROCESSES = ("tests/ops", "tests/test_gpu.py"), 8
DRY = "dry run: figures mean nothing"
NOT_RUN = "not run: out of time"
BUDGET_SECONDS, TEST_SECONDS = 480, 240  # of nine minutes, the rest is for files and pictures
MAX_COPIES = 64  # of a case's inputs
# The reference holds some ten float32 tensors of the logits' size: beyond this floor it is left out.
REFERENCE_BYTES = 1 << 30
SANITIZERS = ("memcheck", "racecheck", "initcheck")


def gpu_backends(dry: bool) -> list[str]:
    """Backends that serve CUDA tensors here; in a dry run those that can stand in for them."""
    names = ("triton", "reference") if dry else backends.backends_for("cuda")
    return [name for name in names if name in mk.available_backends()]


def device_facts(dry: bool) -> dict[str, object]:
    """The device, driver and versions that figures belong to."""
    facts = results.machine_facts()
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    facts |= {"host": facts["device"], "triton": triton, "backends": ", ".join(gpu_backends(dry))}
    if dry:
        return facts | {"device": "dry run"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts |= {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"]
        facts["nvidia_smi"] = subprocess.run(query, check=False, capture_output=True, text=True).stdout.strip()
    return facts


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, str]:
    """Ours, with the repository's root on Python's path: the package need not be installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run_logged(commands: Sequence[list[str]], logs: Sequence[Path], seconds: float) -> list[int]:
    """Run the commands side by side from the repository's root, the output of each in its log.

    Their exit statuses; 124 for one that was stopped because it took too long.
    """
    deadline, statuses = time.monotonic() + seconds, []
    with contextlib.ExitStack() as files:
        processes = []
        for command, log in zip(commands, logs, strict=True):
            file = files.enter_context(log.open("w"))
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file))
        for process in processes:
            try:
                statuses.append(process.wait(max(deadline - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                statuses.append(124)
    return statuses


def gpu_tests(directory: Path, seconds: float) -> tuple[str, bool]:
    """Run ``pytest -m gpu``; (what came of it, whether all passed). Everything pytest said is in tests.txt.

    Triton compiles a kernel for every shape and dtype: one process took minutes for that alone, so the tests are dealt
    out to several.
    """
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    collect = subprocess.run(
        [*pytest, "--collect-only", *TESTS], check=False, cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    tests = [text for text in collect.stdout.splitlines() if text.startswith("tests/") and "::" in text]
    if not tests:
        (directory / "tests.txt").write_text(collect.stdout + collect.stderr)
        return "no tests were found, see tests.txt", False
    count = max(1, min(TEST_PROCESSES, (os.cpu_count() or 1) // 2, len(tests)))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{index}.txt") for index in range(count)]
        statuses = run_logged([[*pytest, *tests[index::count]] for index in range(count)], logs, seconds)
        said = [log.read_text().strip() for log in logs]
    (directory / "tests.txt").write_text("\n\n".join(said) + "\n")
    outcome: collections.Counter = collections.Counter()
    for text in said:
        for number, what in re.findall(
            r"(\d+) (passed|failed|skipped|errors?)\b", text.splitlines()[-1] if text else ""
        ):
            outcome[what.removesuffix("s") if what.startswith("error") else what] += int(number)
    stopped = statuses.count(124)
    summary = ", ".join(f"{number} {what}" for what, number in sorted(outcome.items()))
    return summary + (f"; {stopped} of {count} processes stopped at {seconds:.0f} s" if stopped else ""), not any(
        statuses
    )


def sanitize(directory: Path, seconds: float) -> dict[str, str]:
    """Every case's kernels once, small, under each tool of compute-sanitizer: tool -> what came of it."""
    if shutil.which("compute-sanitizer") is None:
        return {"compute-sanitizer": "not on the PATH"}
    outcome, said = {}, []
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench", "gpu"]
        with tempfile.NamedTemporaryFile(suffix=".txt") as log:
            (status,) = run_logged([[*command, "--once"]], [Path(log.name)], seconds)
            text = Path(log.name).read_text()
        summary = [line for line in text.splitlines() if "SUMMARY" in line]
        outcome[tool] = f"exit status {status}; {' '.join(summary)}"
        said.append(f"== {tool}\n{text}")
        (directory / "sanitizers.txt").write_text("\n".join(said))
    return outcome


def run_once(device: str, chosen: Sequence[Case]) -> int:
    """Each case at small size, once on each of our backends, checked: what the sanitizers watch."""
    status = 0
    for case in chosen:
        names = gpu_backends(device == "cpu")
        workload = workloads.build(case, device, names, compiler=lambda function: function, dry=True)
        ours = workload._replace(calls={name: workload.calls[name] for name in names})
        rows = {name: Row(case.label, name) for name in names}
        run.checked(ours, rows)
        for row in rows.values():
            print(f"{row.case:44} {row.provider:10} {row.note or f'deviation {row.error:.1e}'}", flush=True)
            status |= bool(row.note)
    return status


def contenders_of(
    workload: workloads.Workload, calls: dict[str, Callable], timer: CudaTimer | HostTimer
) -> dict[str, Contender]:
    """The calls over as many copies of the inputs as make reads and writes miss the L2 cache."""
    each = workloads.size_of(workload.inputs) + workload.bytes_moved // 3
    count = min(max(-(-timer.cold_bytes // each), 2), MAX_COPIES)
    sets = workloads.copies(workload.inputs, count)
    return {
        provider: Contender(
            [functools.partial(call, inputs) for inputs in sets],
            functools.partial(workloads.backend_context, provider),
        )
        for provider, call in calls.items()
    }


def fill(row: Row, figures: Figures, ours: Figures | None) -> None:
    """The figures of one contender, and its speedup: by the kernel figure where both have one, else by the stream's."""
    if figures.kernel:
        row.seconds_low, row.seconds, row.seconds_high = quartiles(figures.kernel)
        row.bytes_per_second = row.bytes_moved / row.seconds
    row.stream_seconds = statistics.median(figures.stream)
    row.enqueue_seconds = statistics.median(figures.enqueue)
    if ours is None:
        return
    if figures.kernel and ours.kernel:
        row.speedup, row.speedup_low, row.speedup_high = ratio(figures.kernel, ours.kernel)
    else:
        row.speedup, row.speedup_low, row.speedup_high = ratio(figures.stream, ours.stream)
        row.note = f"speedup by the stream figure; {row.note}"


def measure(case: Case, timer: CudaTimer | HostTimer, device: str, rounds: int, compiler: Callable) -> list[Row]:
    """Check and time every contender of one case; ours, the first backend, is what speedups are over."""
    dry = isinstance(timer, HostTimer)
    names = gpu_backends(dry)
    torch._dynamo.reset()
    workload = workloads.build(case, device, names, compiler, dry)
    if workload.bytes_moved > REFERENCE_BYTES and len(names) > 1:
        workload.calls.pop("reference")
    rows = {name: Row(case.label, name, bytes_moved=workload.bytes_moved) for name in workload.calls}

    def failed(provider: str, error: Exception) -> None:
        rows[provider].note = f"no graph: {run.failure(error)}"

    with torch.set_grad_enabled(workload.needs_grad):
        contenders = contenders_of(workload, run.checked(workload, rows), timer)
        for provider, (calls, context) in list(contenders.items()):
            try:
                with context():
                    calls[0]()  # outside the counts: first calls compile and allocate
                    rows[provider].launches = timer.launches(calls[0])
                    rows[provider].peak_bytes = timer.peak_bytes(calls[0])
            except Exception as error:  # out of memory say
                rows[provider].note = run.failure(error)
                del contenders[provider]
        figures = interleave_on_device(timer, contenders, rounds, failed)
    for provider, figure in figures.items():
        fill(rows[provider], figure, figures.get(names[0]))
    return list(rows.values())


def measure_all(
    cases: Sequence[Case], timer: CudaTimer | HostTimer, device: str, rounds: int, deadline: float
) -> Iterator[tuple[list[Row], list[Verdict]]]:
    """The rows and verdicts of each case as soon as it is done; cases that the deadline leaves out are recorded as not run."""
    dry = isinstance(timer, HostTimer)
    compiler = functools.partial(torch.compile, backend="aot_eager") if dry else torch.compile
    ceilings = {}
    if importlib.util.find_spec("triton"):
        from . import peaks

        rows = peaks.ceilings(timer, device, rounds, dry)
        ceilings = {row.provider: row.bytes_per_second for row in rows}
        for row in rows:
            if dry:
                row.note = f"{DRY}; {row.note}"
            else:
                print(run.line(row), flush=True)
        yield rows, []
    ours = gpu_backends(dry)[0]
    for case in cases:
        if time.monotonic() > deadline:
            new = [Row(case.label, ours, note=NOT_RUN)]
        else:
            try:
                new = measure(case, timer, device, rounds, compiler)
            except Exception as error:  # a case that cannot even be built, for memory say
                new = [Row(case.label, ours, note=run.failure(error))]
        timer.clear()
        by_provider = {row.provider: row for row in new}
        verdicts = run.judge(case, by_provider, ours, ceilings)
        for row in new:
            print(run.line(row, dry), flush=True)
        if dry:
            for record in new:
                record.note = f"{DRY}; {record.note}".removesuffix("; ")
            for verdict in verdicts:
                verdict.measured = verdict.met = None
        yield new, verdicts


# Which operators a case of this family times: what BY_SIZE of mixupe_kernels/ops/backends.py has rows of.
OPERATORS = {
    "mixupe_loss": ("mixupe_loss", "mixupe_loss_backward", "mixupe_loss_backward_out"),
    "ce_entropy": ("ce_entropy",),
    "ce_entropy backward": ("ce_entropy_backward",),
    "mix": ("mix",),
    "mixed and clean out=": ("mix_out",),
}
WORTH = 0.95  # a backend takes a size from the one before it if it needs at most this share of its time


def by_size(cases: Sequence[Case], rows: Sequence[Row], names: Sequence[str]) -> str:
    """The rows that BY_SIZE should have by these figures, as Python: per operator, from which size on which backend.

    By the time of a call in a stream, which has the host's in it; of sizes of several dtypes, by the sum of their times.
    """
    lines = []
    for family, operators in OPERATORS.items():
        times: dict[int, dict[str, float]] = {}
        for case in cases:
            found = {row.provider: row.stream_seconds for row in rows if row.case == case.label}
            known = {name: found[name] for name in names if found.get(name) is not None}
            if case.family != family or len(known) < len(names):
                continue
            elements = math.prod(case.shape) * (2 if family == "mixupe_loss" else 1)  # which has 2B rows
            of_size = times.setdefault(elements, dict.fromkeys(names, 0.0))
            for name, seconds in known.items():
                of_size[name] += seconds
        kept: list[tuple[int, str]] = []
        serving = names[0]
        for elements, of_size in sorted(times.items()):
            best = min(of_size, key=lambda name: of_size[name])
            if best != serving and of_size[best] <= WORTH * of_size[serving]:
                kept.append((elements, best))
                serving = best
        text = ", ".join(f'From({elements}, "{name}")' for elements, name in kept)
        lines += [f'"{operator}": ({text},),' for operator in operators if kept]
    return "".join(f"{line}\n" for line in lines) or f"# {names[0]} at every size\n"


def failed(rows: Sequence[Row]) -> list[Row]:
    """Rows of ours that were run and are wrong: one that was not run says nothing."""
    ours = set(mk.available_backends())
    return [row for row in rows if row.provider in ours and row.error is None and NOT_RUN not in row.note]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--rest", action="store_true", help="only the cases that --quick leaves out")
    parser.add_argument("--dry-run", action="store_true", help="the whole path on a CPU, at small sizes, no figures")
    parser.add_argument("--no-tests", action="store_true", help="skip pytest -m gpu")
    parser.add_argument("--sanitize", action="store_true", help="also run the kernels under compute-sanitizer")
    parser.add_argument("--no-bars", action="store_true", help="exit with 0 whatever the bars say")
    parser.add_argument("--once", action="store_true", help="only run every case's kernels once, small, and check them")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--seconds", type=float, default=BUDGET_SECONDS, help="no case begins later than this (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="where results go; bench/results/<device> if not given")
    options = parser.parse_args(arguments)
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when it is imported, so a process of its own has to start with it.
        interpreted = {**environment(), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.call([sys.executable, "-m", "bench", "gpu", *arguments], env=interpreted)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False (--dry-run walks the same path on a CPU)")
        return 2
    device = "cpu" if options.dry_run else "cuda"
    if options.once:
        return run_once(device, [case for case in GPU_CASES if options.only in case.label])
    deadline = time.monotonic() + options.seconds
    test_seconds = min(TEST_SECONDS, options.seconds / 2)
    facts = device_facts(options.dry_run)
    directory = options.out or results.RESULTS / ("dry" if options.dry_run else slug(str(facts["device"])))
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in facts.items():
        print(f"{name:16} {value}")
    passed = True
    if not options.no_tests:
        facts["tests"], passed = gpu_tests(directory, test_seconds)
        print(f"GPU tests: {facts['tests']}", flush=True)
    if options.sanitize:
        facts["sanitizers"] = sanitize(directory, test_seconds)
        print(f"sanitizers: {facts['sanitizers']}", flush=True)
    left_out = {options.quick: False, options.rest: True}.get(True)
    cases = [case for case in GPU_CASES if options.only in case.label and case.quick is not left_out]
    timer = HostTimer() if options.dry_run else CudaTimer()
    rounds = 2 if options.dry_run else 7 if options.quick else 11
    title = DRY if options.dry_run else f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}"
    rows: list[Row] = []
    verdicts: list[Verdict] = []
    for new_rows, new_verdicts in measure_all(cases, timer, device, rounds, deadline):
        rows, verdicts = rows + new_rows, verdicts + new_verdicts
        results.write(directory, facts, rows, verdicts)  # a run that is cut short leaves what it has
    serving = [name for name in gpu_backends(options.dry_run) if name != "reference"]
    print(f"BY_SIZE of mixupe_kernels/ops/backends.py:\n{by_size(cases, rows, serving)}", flush=True)
    run.finish(directory, facts, rows, verdicts, title)
    wrong = failed(rows)
    for row in wrong:
        print(f"failed: {row.case}, {row.provider}: {row.note}")
    return 1 if wrong or not passed else run.exit_status(verdicts, options.no_bars)
