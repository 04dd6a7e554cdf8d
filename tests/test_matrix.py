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
    locks = {path.stem for path in (matrix.ROOT / "requirements").glob("*-*.lock")}
    assert locks | {"libraries"} == set(matrix.LEGS) - OF_DEVELOPMENT - OF_ANOTHER


def test_a_lock_includes_what_it_names():
    assert "pytest==" in matrix.locked(matrix.ROOT / "requirements.lock")


def test_locks_name_one_version_of_what_they_share():
    lines = [
        (matrix.ROOT / "requirements" / f"{name}.lock").read_text().splitlines() for name in ("tests", "borrowed-gpu")
    ]
    tests, borrowed = ({line for line in of if "==" in line} for of in lines)
    assert {line.split("==")[0] for line in borrowed - tests} == {"torch", "triton"}


def test_a_missing_module_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="test_gone"):
        matrix.files_of(matrix.Run("test_gone"), tmp_path)


def test_an_unknown_leg_is_refused():
    with pytest.raises(SystemExit, match="LEG must be one of torch-2.10, .*, got torch-1.0"):
        matrix.main(["torch-1.0"])


def test_a_python_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(SystemExit, match="this leg needs Python 3.99, found none: none of python3.99 runs"):
        matrix.interpreter("3.99")
    (tmp_path / "versions/3.99.1/bin").mkdir(parents=True)
    python = tmp_path / "versions/3.99.1/bin/python3.99"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    assert matrix.interpreter("3.99") == str(python)
    assert matrix.interpreter("") == sys.executable
