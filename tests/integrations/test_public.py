"""Adapters stand on what libraries publish: no private name is imported, called or overridden."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from . import library

FOLDER = Path(__file__).parents[2] / "mixupe_kernels" / "integrations"
LIBRARIES = {
    "timm": "timm",
    "lightning": "lightning.pytorch",
    "transformers": "transformers",
    "torchmetrics": "torchmetrics",
    "skorch": "skorch",
    "fastai": "fastai.basics",
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_adapter_is_here():
    assert {file.stem for file in FOLDER.glob("*.py")} == {"__init__", "like_timm", *LIBRARIES}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_only_its_own_private_names(file):
    tree = ast.parse(file.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not any(private(part) for part in (node.module or "").split("."))
            assert not any(private(alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and private(node.attr):
            mine = isinstance(node.value, ast.Name) and node.value.id == "self"
            assert mine or node.attr in own or node.attr in ("_asdict", "_replace", "_make"), node.attr


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_private_is_overridden(name):
    library(LIBRARIES[name])
    module = importlib.import_module(f"mixupe_kernels.integrations.{name}")
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    assert classes
    for cls in classes:
        others = [base for base in cls.__mro__ if not base.__module__.startswith("mixupe_kernels")]
        overridden = {member for member in vars(cls) if private(member) and any(member in vars(b) for b in others)}
        assert not overridden - {"_abc_impl"}
