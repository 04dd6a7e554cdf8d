"""bench/micro: pytest-benchmark runs it, keeps its figures and compares with those it kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_micro(*arguments):
    command = [sys.executable, "-m", "pytest", "bench/micro", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # by which pytest-benchmark would know that it must not time anything
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_contender_that_compiles_nothing_is_right():
    run = run_micro("--benchmark-disable", "-k", "not compile and not bfloat16 and not 1000 and not buffer")
    assert run.returncode == 0, run.stdout[-3000:]


def test_figures_are_kept_and_compared(tmp_path):
    ours = ["-k", "test_mix and 100 and copy", f"--benchmark-storage={tmp_path}"]
    kept = run_micro(*ours, "--benchmark-autosave")
    (file,) = tmp_path.rglob("*.json")
    (figures,) = json.loads(file.read_text())["benchmarks"]
    assert kept.returncode == 0 and figures["group"] == "mix 100×64 float32, cpu" and figures["name"] == "copy_"
    again = run_micro(*ours, "--benchmark-compare")
    assert again.returncode == 0 and "copy_ (0001_" in again.stdout and "copy_ (NOW)" in again.stdout
