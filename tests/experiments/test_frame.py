"""The frame of experiments: what is resumed, what is written, and the statistics of tables."""

import math
import types

import pytest
from rich.console import Console

from experiments import frame


def module(calls, cells=("a 1", "2")):
    def run(cell, options):
        calls.append(cell)
        return [{"seed": seed, "value": len(cell) / 3 + seed} for seed in range(options.seeds)]

    return types.SimpleNamespace(cells=lambda options: list(cells), run=run)


def test_a_cell_is_computed_once(tmp_path):
    calls, options, store = [], frame.Options(seeds=2), tmp_path / "rows.csv"
    rows = frame.compute(module(calls), options, store, Console(quiet=True))
    assert calls == ["a 1", "2"] and [row["cell"] for row in rows] == ["a 1", "a 1", "2", "2"]
    assert rows[0]["value"] == pytest.approx(1.0) and rows[3] == {
        "cell": "2",
        "settings": "seeds=2",
        "seed": 1,
        "value": pytest.approx(4 / 3, rel=1e-5),
    }
    # Another cell is added later: it alone is computed, and rows of cells that are not asked for are left out.
    rows = frame.compute(module(calls, ("2", "c")), options, store, Console(quiet=True))
    assert calls == ["a 1", "2", "c"] and frame.distinct(rows, "cell") == ["2", "c"]


def test_a_run_that_fails_keeps_what_was_done(tmp_path):
    calls, store = [], tmp_path / "rows.csv"
    failing = module(calls)
    first = failing.run

    def run(cell, options):
        if cell == "2":
            raise RuntimeError("stopped")
        return first(cell, options)

    failing.run = run
    with pytest.raises(RuntimeError, match="stopped"):
        frame.compute(failing, frame.Options(seeds=2), store, Console(quiet=True))
    frame.compute(module(calls), frame.Options(seeds=2), store, Console(quiet=True))
    assert calls == ["a 1", "2"]


def test_rows_of_other_settings_are_not_taken_for_done(tmp_path):
    calls, store, folder = [], tmp_path / "rows.csv", tmp_path / "data"
    folder.mkdir()
    (folder / "set.csv").write_text("1")
    runs = [frame.Options(seeds=2), frame.Options(seeds=3), frame.Options(seeds=2, full=True)]
    runs += [frame.Options(seeds=2, quick=True), frame.Options(seeds=2, data=folder)]
    for options in runs * 2:
        rows = frame.compute(module(calls), options, store, Console(quiet=True))
        assert [row["seed"] for row in rows] == 2 * list(range(options.seeds))
        assert {row["settings"] for row in rows} == {options.settings}
    assert calls == ["a 1", "2"] * len(runs)
    # A folder is known by what it holds: it may move, and what is added to it counts.
    before = runs[-1].settings
    moved = folder.rename(tmp_path / "moved")
    assert frame.Options(seeds=2, data=moved).settings == before
    (moved / "set.csv").write_text("12")
    assert frame.Options(seeds=2, data=moved).settings != before


def test_committed_rows_stay_with_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    assert frame.place("some", frame.Options(seeds=2)) == tmp_path
    frame.append(tmp_path / "some.csv", [{"cell": "1", "settings": "seeds=8", "value": 1}])
    assert frame.place("some", frame.Options(seeds=8)) == tmp_path
    for other in (frame.Options(seeds=2), frame.Options(full=True), frame.Options(quick=True)):
        assert frame.place("some", other).name == "experiments"
    with pytest.raises(ValueError, match="unknown"):
        frame.append(tmp_path / "some.csv", [{"cell": "1", "settings": "seeds=8", "unknown": 1}])


def test_columns_are_paired_by_seed():
    rows = [
        {"seed": seed, "method": method, "error": seed + shift}
        for method, shift in (("a", 0.0), ("b", 0.5))
        for seed in (2, 0, 1)
    ]
    assert frame.column(rows, "error", method="a") == [0, 1, 2]
    mean, error = frame.paired(frame.column(rows, "error", method="b"), frame.column(rows, "error", method="a"))
    assert (mean, error) == (0.5, 0.0)
    mean, error = frame.mean_error([1.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))
    assert frame.mean_error([7.0]) == (7.0, 0.0) and frame.pm([1.0, 3.0], 1) == "2.0 ± 1.0"


def test_values_keep_their_kind(tmp_path):
    row = {"cell": "1", "name": "α = 8", "whole": 3, "real": 0.1, "none": ""}
    frame.append(tmp_path / "rows.csv", [row])
    assert frame.read(tmp_path / "rows.csv") == [row]


def test_the_size_of_a_run():
    assert [
        frame.Options(quick=q, full=f).pick(1, 2, 3) for q, f in ((True, False), (False, False), (False, True))
    ] == [1, 2, 3]
    assert frame.Options(full=True).pick(1, 2) == 2
