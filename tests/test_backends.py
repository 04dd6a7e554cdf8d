"""Choosing a backend, reporting on backends, and what importing the package costs."""

import subprocess
import sys

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels import __main__ as doctor
from mixupe_kernels.ops import backends, reference


def test_reference_is_always_there():
    assert "reference" in mk.available_backends()
    assert set(mk.available_backends()).isdisjoint(backends.missing_backends())


def test_use_backend_switches_and_restores(monkeypatch):
    calls = []
    original = reference.mix
    monkeypatch.setattr(reference, "mix", lambda *args: calls.append(1) or original(*args))
    x = torch.randn(4, 3)
    before = backends.serving("cpu")
    with mk.use_backend("reference"):
        assert backends.serving("cpu") == "reference"
        mk.mix(x, "flip", 0.5)
    assert len(calls) == 1
    assert backends.serving("cpu") == before
    if before != "reference":
        mk.mix(x, "flip", 0.5)
        assert len(calls) == 1


def test_use_backend_restores_after_an_error_and_nests():
    before = backends.serving("cpu")
    with pytest.raises(RuntimeError, match="inside"), mk.use_backend("reference"):
        with mk.use_backend(before):
            assert backends.serving("cpu") == before
        assert backends.serving("cpu") == "reference"
        raise RuntimeError("inside")
    assert backends.serving("cpu") == before


def test_unknown_and_missing_backends_are_refused():
    with pytest.raises(ValueError, match="backend must be one of 'reference'.*got 'fast'"), mk.use_backend("fast"):
        pass
    for name, reason in backends.missing_backends().items():
        with pytest.raises(ValueError) as caught, mk.use_backend(name):
            pass
        assert reason in str(caught.value)


def test_missing_library_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    assert "C++ compiler" in backends._load_library("_cpu")
    (tmp_path / "_build_log.txt").write_text("cmake was not found\n")
    assert "cmake was not found" in backends._load_library("_cpu")
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    assert "does not load" in backends._load_library("_cpu")


def test_doctor_names_every_backend(capsys):
    assert doctor.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("reference", "cpp", "triton", "cuda"):
        assert f"backend {name}" in printed
    for reason in backends.missing_backends().values():
        assert reason in printed
    assert doctor.main([]) == 2


IMPORT_PROBE = """
import sys, time
import torch
begin = time.perf_counter()
import mixupe_kernels
print(time.perf_counter() - begin)
print(*[m for m in ("triton", "matplotlib", "sklearn", "numpy.testing", "rich", "scipy") if m in sys.modules])
"""


def test_import_is_light():
    runs = [subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    # The fastest of three: a shared machine can only add time.
    assert min(float(run.stdout.splitlines()[0]) for run in runs) < 0.1
    before = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE.replace("import mixupe_kernels\n", "")], capture_output=True, text=True
    )
    assert runs[0].stdout.splitlines()[1] == before.stdout.splitlines()[1]  # nothing that torch had not imported
