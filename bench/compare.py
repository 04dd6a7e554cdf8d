"""``python -m bench compare OLD NEW``: the operators and a step, before and after a change.

OLD and NEW are git revisions, ``.`` for the working tree, or folders of results. Of revisions each has a process, and the two
take turns, so that what the machine does meets both; of a folder there are only the figures of its run. Exits with 1
where NEW takes over 1.05 of OLD's time by more than two standard errors.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import results
from .cases import CPU_CASES, Case, Row
from .timing import Ratio, ratio

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build" / "compare"
LIMIT = 1.05
TURN_SECONDS = 2e-2
STEP = "step of MLP 64-128-128-10"
# Beside the cases of ``bench cpu``: where calls are short, their overhead is what changes.
CASES = (Case("mixupe_loss", (16, 10)), Case("mixupe_loss", (64, 10)), *(case for case in CPU_CASES if case.quick))


class Comparison(NamedTuple):
    """Of one case: NEW's time over OLD's and its standard error, NaN where that is not known."""

    case: str
    ratio: Ratio
    error: float

    @property
    def slower(self) -> bool:
        return self.ratio.median > LIMIT + (0 if math.isnan(self.error) else 2 * self.error)


# Revisions ---------------------------------------------------------------------------------------------------------------


def tree_of(revision: str) -> Path:
    """A folder with the package as it was at ``revision``, built: the checkout for ``.``, else one under build/compare."""
    if revision == ".":
        return ROOT
    commit = _run("git", "rev-parse", "--verify", f"{revision}^{{commit}}").strip()
    tree = BUILDS / commit
    if (tree / "built").exists():
        return tree
    tree.mkdir(parents=True, exist_ok=True)
    # Without its bench, which a worker would find before this checkout's: cases go by their places in one list.
    archive = subprocess.run(
        ["git", "archive", commit, "--", ".", ":!bench"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    _run("cmake", "-S", str(tree), "-B", str(tree / "build"), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         "-DMIXUPE_BINDINGS=OFF")  # fmt: skip
    _run("cmake", "--build", str(tree / "build"), "--target", "_cpu")
    (tree / "built").touch()
    return tree


def _run(*command: str) -> str:
    """What a command says; its errors end the comparison with what it complained of."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": tools}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


class Worker:
    """A process that has imported one tree's package, and times its calls when it is asked to."""

    def __init__(self, tree: Path):
        # The tree's package, and the bench of this checkout for both.
        path = os.pathsep.join([str(tree), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.compare"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: int, count: int) -> float:
        """Of a call, by ``count`` of them; nothing but a warm-up if that is 0."""
        print(case, count, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of a revision ended with {self._process.wait()}")
        return float(answer)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def interleaved(old: Path, new: Path, cases: Sequence[int], rounds: int) -> list[Comparison]:
    """Both trees' times of each case, by turns."""
    workers = {"old": Worker(old), "new": Worker(new)}
    source, found = random.Random(0), []
    names = labels()
    for case in cases:
        for worker in workers.values():
            worker.seconds(case, 3)
        count = max(1, round(TURN_SECONDS / workers["old"].seconds(case, 3)))
        times: dict[str, list[float]] = {"old": [], "new": []}
        for _ in range(rounds):
            for name in source.sample(list(workers), 2):
                times[name].append(workers[name].seconds(case, count))
        found.append(compared(names[case], times["old"], times["new"]))
        print(line(found[-1]), flush=True)
    for worker in workers.values():
        worker.end()
    return found


def compared(name: str, old: list[float], new: list[float]) -> Comparison:
    found = ratio(new, old)
    # Each pair has turns of its own: without the factor for turns of a base that two share.
    return Comparison(name, found, found.standard_error(len(new)) / (4 / 3) ** 0.5)


def labels() -> list[str]:
    return [*(case.label for case in CASES), STEP]


# In a worker ---------------------------------------------------------------------------------------------------------------


def _call_of(index: int) -> Callable[[], object]:
    from mixupe_kernels.ops import backends

    from . import workloads

    if index == len(CASES):
        return _step()
    ours = backends.serving("cpu")
    workload = workloads.build(CASES[index], "cpu", [ours], compiler=lambda function: function)
    return lambda: workload.calls[ours](workload.inputs)


def _step() -> Callable[[], object]:
    import torch

    from . import methods, models

    torch.manual_seed(0)
    model = models.mlp(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = methods.make_step(methods.POLICIES["recipe"], model, optimizer, alpha=1.0, eta=1e-3)
    x, labels = torch.randn(100, 64), torch.randint(10, (100,))
    return lambda: step(x, labels)


def work() -> None:
    """Answer lines of "case count" with the seconds of a call."""
    import time

    import torch

    torch.set_num_threads(2)
    calls: dict[int, Callable[[], object]] = {}
    for text in sys.stdin:
        case, count = map(int, text.split())
        call = calls.get(case) or calls.setdefault(case, _call_of(case))
        for _ in range((count + 3) // 4):  # the other process has left the caches in its own state
            call()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        print((time.perf_counter() - begin) / count, flush=True)


# Folders -------------------------------------------------------------------------------------------------------------------


def recorded(old: Path, new: Path) -> list[Comparison]:
    """What two runs recorded of the same contenders. They did not take turns: the error is of each run's own quartiles."""
    rows = [
        {(row.case, row.provider): row for row in results.read_csv(folder / "rows.csv", Row)} for folder in (old, new)
    ]
    ours = json.loads((new / "results.json").read_text())["machine"]["backend"]
    found = []
    for key, before in rows[0].items():
        after = rows[1].get(key)
        if after is None or key[1] != ours or not before.seconds or not after.seconds:
            continue
        median = after.seconds / before.seconds
        spread = [(row.seconds_high - row.seconds_low) / row.seconds / 1.35 for row in (before, after)]
        error = median * math.hypot(*spread)
        found.append(Comparison(key[0], Ratio(median, median - 0.675 * error, median + 0.675 * error), error))
    return found


def line(found: Comparison) -> str:
    error = "" if math.isnan(found.error) else f" ± {found.error:.3f}"
    verdict = f"over {LIMIT}" if found.slower else ""
    return f"{found.case:44} {found.ratio.median:.3f}{error}  ({found.ratio.low:.3f}-{found.ratio.high:.3f})  {verdict}".rstrip()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("old", help="a git revision, . for the working tree, or a folder of results")
    parser.add_argument("new", help="the same")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=31, help="turns of each (default 31)")
    options = parser.parse_args(arguments)
    folders = [Path(name) for name in (options.old, options.new) if (Path(name) / "rows.csv").exists()]
    if len(folders) == 1:
        parser.error(f"OLD and NEW must both be revisions or both be folders of results, of which {folders[0]} is one")
    if folders:
        found = [each for each in recorded(*folders) if options.only in each.case]
        for each in found:
            print(line(each))
    else:
        cases = [index for index, name in enumerate(labels()) if options.only in name]
        found = interleaved(tree_of(options.old), tree_of(options.new), cases, options.rounds)
    if not found:
        parser.error(f"no case that both have has {options.only!r} in its name")
    slower = [each.case for each in found if each.slower]
    print(f"NEW takes over {LIMIT} of OLD's time beyond its error: {', '.join(slower) or 'nowhere'}")
    return 1 if slower else 0


if __name__ == "__main__":
    work()
