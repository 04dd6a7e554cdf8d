"""The loops of other libraries. `make test-matrix LEG=libraries` has them all, at the versions of requirements/libraries.lock."""

import importlib
import os

import pytest


def library(name: str):
    """The module, which the leg of libraries must have; elsewhere its tests are left out where it is not installed."""
    if os.environ.get("MIXUPE_LIBRARIES") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; `make test-matrix LEG=libraries` installs it")
