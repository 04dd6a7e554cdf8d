"""Every experiment's command with ``--quick``: rows, table and picture, and a second call that computes nothing.

``make test`` runs the cheapest; ``make test-matrix LEG=experiments`` runs all.
"""

import importlib

import matplotlib.image
import pytest

from experiments import __main__ as command
from experiments import frame

from ..conftest import THOROUGH
from . import folders

CHEAP = ("perturbed", "graphs")
# The folder that --data names, for those whose sets are in wheels that an environment may not have.
DATA = {"speech": folders.utterances, "graphs": folders.graphs}


@pytest.mark.parametrize("name", command.EXPERIMENTS if THOROUGH else CHEAP)
def test_quick(name, tmp_path, capsys, monkeypatch):
    arguments = [name, "--quick", "--out", str(tmp_path / "out")]
    if name in DATA:
        arguments += ["--data", str(DATA[name](tmp_path / "data"))]
    assert command.main(arguments) == 0
    rows = frame.read(tmp_path / "out" / f"{name}.csv")
    assert rows and matplotlib.image.imread(tmp_path / "out" / f"{name}.png").std() > 0
    printed = capsys.readouterr().out
    module = importlib.import_module(f"experiments.{name}")
    for line in module.table(rows).lines:
        assert str(line[0]).split()[0] in printed

    def again(cell, options):
        raise AssertionError(f"{cell} was computed a second time")

    monkeypatch.setattr(module, "run", again)
    assert command.main(arguments) == 0
    assert frame.read(tmp_path / "out" / f"{name}.csv") == rows


def test_each_listed_experiment_has_a_module_with_what_the_frame_calls():
    for name in command.EXPERIMENTS:
        module = importlib.import_module(f"experiments.{name}")
        assert all(callable(getattr(module, part)) for part in ("cells", "run", "table", "draw")), name
        cells = module.cells(frame.Options(quick=True, data=None)) if name not in DATA | {"graphs": 0} else []
        assert len(set(cells)) == len(cells)


def test_the_list(capsys):
    assert command.main([]) == 0 and command.main(["nothing"]) == 2
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in command.EXPERIMENTS) and len(command.EXPERIMENTS) == 15


@pytest.mark.parametrize("name", command.EXPERIMENTS)
def test_committed_rows_are_whole_and_have_a_picture(name):
    """The rows of a full run with 8 seeds (10 folds of graphs): no cell is missing that this checkout computes without ``--data``."""
    rows = frame.read(frame.RESULTS / f"{name}.csv")
    assert len(frame.distinct(rows, "settings")) == 1 and rows[0]["settings"].startswith("seeds=8")
    seeds = {row["seed"] for row in rows if row.get("seed", "") != ""}
    assert len(seeds) == (10 if name == "graphs" else 8)
    assert (frame.RESULTS / f"{name}.png").exists()
    module = importlib.import_module(f"experiments.{name}")
    # Without a folder scikit-learn's digits stand for optdigits.
    cells = (
        {cell.replace("training digits", "training optdigits") for cell in module.cells(frame.Options())}
        if name not in DATA
        else set()
    )
    assert cells <= {row["cell"] for row in rows}
    assert module.table(rows).lines
