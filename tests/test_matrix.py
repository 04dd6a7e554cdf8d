"""The legs of `make test-matrix` name files that there are; what they test takes too long to try here."""

import re
import sys
from pathlib import Path

import pytest

from tests import matrix

OF_DEVELOPMENT = {"emulation", "sanitizers"}  # legs in its environment
OF_ANOTHER = {name for name, leg in matrix.LEGS.items() if leg.shares}


@pytest.mark.parametrize("name", matrix.LEGS)
def test_every_leg_has_its_environment_and_its_tests(name):
    if name in OF_DEVELOPMENT:
        assert matrix.environment(name) == Path(sys.executable)
    else:
        lock = matrix.ROOT / "requirements" / f"{matrix.LEGS[name].shares or name}.lock"
        assert re.search(r"^torch==", matrix.locked(lock), re.MULTILINE)
    for run in matrix.LEGS[name].runs:
        assert all(path.exists() for path in matrix.files_of(run, matrix.ROOT))


def test_every_lock_has_its_leg():
    locks = {path.stem for path in (matrix.ROOT / "requirements").glob("t*-*.lock")}
    assert locks | {"libraries"} == set(matrix.LEGS) - OF_DEVELOPMENT - OF_ANOTHER


def test_a_lock_includes_what_it_names():
    assert "pytest==" in matrix.locked(matrix.ROOT / "requirements.lock")


def test_a_missing_module_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="test_gone"):
        matrix.files_of(matrix.Run("test_gone"), tmp_path)


def test_an_unknown_leg_is_refused():
    with pytest.raises(SystemExit, match="LEG must be one of torch-2.10, .*, got torch-1.0"):
        matrix.main(["torch-1.0"])
