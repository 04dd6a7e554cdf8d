"""bench/borrowed_gpu.sh from end to end with --dry-run, on the CPU.

`make test` walks it with two of the cases, `make test-matrix LEG=borrowed-gpu` with all of them, under such a machine's Python,
torch and Triton.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cases, gpu, results
from bench.cases import EAGER, Row, Verdict

from .conftest import THOROUGH

ROOT = Path(__file__).parents[1]
ONLY = "" if THOROUGH else "256×1000"  # a headline case and one of the others
CHOSEN = [case for case in cases.GPU_CASES if ONLY in case.label]


def walk(out: Path) -> str:
    """What the script says."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(out), "PYTHON": sys.executable}
    environment |= {"LIMIT": "10000", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = [ROOT / "bench" / "borrowed_gpu.sh", "--dry-run", "--only", ONLY]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_borrowed_gpu_is_walked_whole(tmp_path):
    pytest.importorskip("triton", reason="the dry run interprets the Triton kernels")
    out = tmp_path / "out"
    said = walk(out)
    assert "== done after" in said, said
    assert not any(word in said for word in ("Traceback", "failed:", "usage:", "not every backend", "No such file")), (
        said
    )
    assert gpu.DRY in said and "µs" not in said.replace("enqueue, µs ≤", "")

    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8 and max(len(path.parts) for path in files) <= 2
    assert json.loads((out / "quick" / "results.json").read_text())["machine"]["device"] == "dry run"
    tests = (out / "tests.txt").read_text()  # found, and for want of a GPU not run
    assert " error" not in tests and ("deselected" in tests or "skipped" in tests), tests

    assert {case.quick for case in CHOSEN} == {True, False}
    for part, quick in (("quick", True), ("rest", False)):
        rows = results.read_csv(out / part / "rows.csv", Row)
        assert {case.label for case in CHOSEN if case.quick is quick} <= {row.case for row in rows}
        assert {"triton", "reference", EAGER} <= {row.provider for row in rows}
        assert all(row.note.startswith(gpu.DRY) for row in rows) and not gpu.failed(rows)
        verdicts = results.read_csv(out / part / "bars.csv", Verdict)
        assert verdicts and all(verdict.met is None and verdict.measured is None for verdict in verdicts)
