"""``bench compare``: what counts as slower, two trees by turns, two folders, and exit statuses."""

import math
import os
import subprocess
import sys

import pytest

from bench import cases, compare, host, results, run
from bench.cases import Row, Verdict

FAST = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01]


@pytest.mark.parametrize(
    "new, slower",
    [
        (FAST, False),
        ([1.04 * t for t in FAST], False),
        ([1.2 * t for t in FAST], True),
        ([1.06, 0.6, 1.9, 1.06, 0.7, 1.6, 1.07, 1.3], False),  # over by the median, within its error
    ],
)
def test_slower_is_over_the_limit_by_more_than_two_errors(new, slower):
    found = compare.compared("case", FAST, new)
    assert found.slower is slower and not math.isnan(found.error)


def test_a_tree_is_as_fast_as_itself(capsys):
    arguments = [".", ".", "--only", "mix 100×64", "--rounds", "5"]
    assert compare.main(arguments) in (0, 1)  # on a busy machine five turns may say anything
    out = capsys.readouterr().out
    assert out.startswith("mix 100×64 float32") and "±" in out


def folder(path, seconds):
    row = Row("mix 4×4 float32", "cpp", seconds, 0.99 * seconds, 1.01 * seconds)
    other = Row("mix 4×4 float32", "eager", 100 * seconds)
    results.write(path, {"backend": "cpp"}, [row, other], [])
    return str(path)


def test_folders_are_compared_by_what_they_recorded(tmp_path, capsys):
    old, same, slow = (folder(tmp_path / str(s), s) for s in (1.0, 1.001, 1.3))
    assert compare.main([old, same]) == 0
    assert compare.main([old, slow]) == 1
    assert "over 1.05 of OLD's time beyond its error: mix 4×4 float32" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([old, "."])
    with pytest.raises(SystemExit):
        compare.main([old, slow, "--only", "nothing"])


def test_an_unknown_revision_is_refused():
    with pytest.raises(SystemExit, match="rev-parse"):
        compare.tree_of("no-such-revision")


def test_a_worker_that_dies_ends_the_comparison():
    worker = compare.Worker(compare.ROOT)
    with pytest.raises(SystemExit, match="ended with"):
        worker.seconds(10**6, 1)


@pytest.mark.parametrize("met, status", [(True, 0), (None, 0), (False, 1)])
def test_a_missed_bar_is_the_exit_status(met, status):
    verdicts = [Verdict("case", cases.EAGER, 1, 1.0, True), Verdict("case", cases.EAGER, 1, 0.5, met)]
    assert run.exit_status(verdicts, no_bars=False) == status
    assert run.exit_status(verdicts, no_bars=True) == 0


def test_the_hosts_share_has_parts_and_a_bar():
    rows, (verdict,) = host.measure()
    if rows[0].note:
        assert verdict.met is None and "cuda_emulated" in rows[0].note
        return
    whole, *parts = rows
    assert whole.provider == host.WHOLE and len(parts) == 6
    assert verdict.measured == pytest.approx(1e6 * whole.seconds) and verdict.met is not None


def test_both_revisions_run_the_bench_of_this_checkout(monkeypatch, tmp_path):
    """Cases go by their places in its list; a revision's own has others."""
    if not (compare.ROOT / ".git").exists():
        pytest.skip("this copy of the sources has no history")
    run = compare._run
    monkeypatch.setattr(compare, "_run", lambda *command: run(*command) if command[0] == "git" else "")
    monkeypatch.setattr(compare, "BUILDS", tmp_path)
    tree = compare.tree_of("HEAD")
    assert (tree / "mixupe_kernels").exists() and not (tree / "bench").exists()


def test_skipped_launches_write_nothing():
    code = """
import torch, mixupe_kernels as mk
with mk.use_backend("cuda_emulated"):
    out = torch.full((3, 4), 7.0)
    torch.ops.mixupe.mix_out(torch.randn(3, 4), None, torch.tensor(0.5), out=out)
    print(out.unique().tolist())
"""
    if not (compare.ROOT / "mixupe_kernels" / "_cuda_emulated.so").exists():
        pytest.skip("_cuda_emulated is not built")
    said = {}
    for order in ("forward", "none"):
        environment = {**os.environ, "MIXUPE_EMULATED_ORDER": order, "PYTHONPATH": str(compare.ROOT)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        said[order] = run.stdout.strip()
    assert said["none"] == "[7.0]" != said["forward"]
