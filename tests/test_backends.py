"""Choosing a backend, reporting on backends, and what importing the package costs."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels import __main__ as doctor
from mixupe_kernels.ops import backends, registration

from .conftest import why_missing


def test_reference_is_always_there():
    assert "reference" in mk.available_backends()
    assert set(mk.available_backends()).isdisjoint(backends.missing_backends())


def test_use_backend_switches_and_restores(monkeypatch):
    calls = []
    original = registration.references()["mix"]
    monkeypatch.setitem(registration._references, "mix", lambda *args: calls.append(1) or original(*args))
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
    with pytest.raises(ValueError, match="backend must be one of .*'reference'.*got 'fast'"), mk.use_backend("fast"):
        pass
    for name, reason in backends.missing_backends().items():
        with pytest.raises(ValueError) as caught, mk.use_backend(name):
            pass
        assert reason in str(caught.value)


def counting(monkeypatch, name="counting"):
    """A backend in one line of the table, as tests' backends are: its functions are the reference's, and count calls."""
    calls = []

    def counted(operator):
        return lambda *args, **kwargs: calls.append(operator) or given[operator](*args, **kwargs)

    given = registration.references()
    functions = {operator: counted(operator) for operator in ("mix", "ce_entropy")}
    line = backends.Backend(name, (), lambda: functions, on_request=("CPU",), listed=False)
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, line))
    return calls


def test_a_backend_is_one_line_of_the_table(monkeypatch):
    calls = counting(monkeypatch)
    assert "counting" in backends.backends_for("cpu")
    assert backends.serving("cpu") != "counting"
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = mk.mixupe_loss(x, labels, eta=0.1)
    with mk.use_backend("counting"):
        mk.mix(x, "flip", 0.5)
        mk.ce_entropy(x, labels)
        torch.testing.assert_close(mk.mixupe_loss(x, labels, eta=0.1), expected)  # the reference has what it has not
    assert calls == ["mix", "ce_entropy"]


def test_a_size_has_the_backend_of_its_row(monkeypatch):
    """Where nothing is asked for; a backend that is missing leaves its sizes to the first that works."""
    calls = counting(monkeypatch)
    line = backends.BACKENDS[-1]
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS[:-1], line._replace(keys=("CPU",))))
    rows = (backends.From(0, "reference"), backends.From(100, "counting"), backends.From(1000, "no such"))
    monkeypatch.setattr(backends, "BY_SIZE", {"CPU": {"mix": rows}})

    def served(elements):
        calls.clear()
        mk.mix(torch.randn(2, elements // 2), "flip", 0.5)
        return bool(calls)

    try:
        with mk.use_backend("reference"):
            assert not served(200)  # what is asked for decides at every size
        assert [served(elements) for elements in (98, 100, 2000)] == [False, True, True]
        calls.clear()
        mk.ce_entropy(torch.randn(50, 4), torch.zeros(50, dtype=torch.int64))
        assert not calls
    finally:
        monkeypatch.undo()
        with mk.use_backend("reference"):
            pass


def test_the_rows_by_size_are_of_operators_and_backends():
    for key, table in backends.BY_SIZE.items():
        names = [backend.name for backend in backends.BACKENDS if key in backend.keys]
        for operator, rows in table.items():
            assert operator in registration.operators()
            assert [row.elements for row in rows] == sorted({row.elements for row in rows})
            assert {row.backend for row in rows} <= set(names)


def test_a_library_has_no_other_librarys_operators():
    """Of two that serve one device: the emulated one leaves batch norm to PyTorch's kernels, whatever cpp has."""
    if why_missing("cuda_emulated"):
        pytest.skip("_cuda_emulated is not built")
    (line,) = [backend for backend in backends.BACKENDS if backend.name == "cuda_emulated"]
    assert set(registration.operators()) - set(line.functions()) == {"normalise_apart", "normalise_apart_backward"}


def test_users_are_not_told_of_what_is_for_tests(monkeypatch):
    def unavailable():
        raise backends.Unavailable("not built")

    for listed in (True, False):
        lines = (
            backends.Backend("built", (), dict, on_request=("CPU",), listed=listed),
            backends.Backend("emulated", (), unavailable, on_request=("CPU",), listed=listed),
        )
        monkeypatch.setattr(backends, "BACKENDS", lines)
        assert mk.available_backends() == (["built"] if listed else [])
        assert backends.missing_backends() == ({"emulated": "not built"} if listed else {})
        with pytest.raises(ValueError, match="not built"), mk.use_backend("emulated"):
            pass


def test_blocks_of_two_threads_may_interleave(monkeypatch):
    counting(monkeypatch)
    before, order = backends.serving("cpu"), []
    entered, may_leave = threading.Event(), threading.Event()

    def other():
        with mk.use_backend("counting"):
            entered.set()
            may_leave.wait(10)
            order.append(backends.serving("cpu"))

    thread = threading.Thread(target=other)
    with mk.use_backend("reference"):
        thread.start()
        assert entered.wait(10)
        assert backends.serving("cpu") == "counting"  # the last that began
    assert backends.serving("cpu") == "counting"
    may_leave.set()
    thread.join()
    assert order == ["counting"] and backends.serving("cpu") == before


THREADS = """
import threading, time, torch, mixupe_kernels as mk
from mixupe_kernels.ops import backends
torch.set_num_threads(1)
before, end, failures = backends.serving("cpu"), time.monotonic() + 2, []
logits, labels = torch.randn(64, 10), torch.randint(10, (64,))
expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")

def compute():
    while time.monotonic() < end and not failures:
        if not torch.allclose(mk.ce_entropy(logits, labels).ce, expected, atol=1e-5):
            failures.append("wrong")

def switch(name):
    while time.monotonic() < end and not failures:
        with mk.use_backend(name):
            mk.ce_entropy(logits, labels)

threads = [threading.Thread(target=compute) for _ in range(2)]
threads += [threading.Thread(target=switch, args=(name,)) for name in (before, "reference", "reference")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failures, backends.serving("cpu") == before)
"""


def test_threads_may_switch_while_others_compute():
    run = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == ["[]", "True"], (run.returncode, run.stdout, run.stderr)


def shared_library(path, code):
    source = path.with_suffix(".c")
    source.write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)


def why_not_loaded(name, key="CPU"):
    with pytest.raises(backends.Unavailable) as caught:
        backends._load(name, key)
    return str(caught.value)


def test_a_library_that_is_not_there_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    assert "C++ compiler" in why_not_loaded("_cpu")
    (tmp_path / "_build_log.txt").write_text("cmake was not found\n")
    assert "cmake was not found" in why_not_loaded("_cpu")
    (tmp_path / "_build_log.txt").write_bytes("erreur : fichier non trouv\xe9".encode("latin-1"))
    assert "fichier non trouv" in why_not_loaded("_cpu")


def test_a_library_that_does_not_load_says_the_loaders_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    assert "file too short" in why_not_loaded("_cpu") or "invalid ELF header" in why_not_loaded("_cpu")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_a_library_of_another_torch_a_truncated_and_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    shared_library(tmp_path / "_other.so", "void of_another_torch(void); void call(void) { of_another_torch(); }")
    assert "undefined symbol: of_another_torch" in why_not_loaded("_other")
    shared_library(tmp_path / "_empty.so", "int nothing;")
    assert "registers no operator for XPU" in why_not_loaded("_empty", "XPU")
    whole = (tmp_path / "_empty.so").read_bytes()
    for size in (0, 40, 100, len(whole) // 8, len(whole) // 3):
        (tmp_path / "_cut.so").write_bytes(whole[:size])
        assert "does not load" in why_not_loaded("_cut")


def test_facts_are_of_the_library_that_serves(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    assert backends.build_facts() == {}


DEBUGGED = """
import torch, mixupe_kernels as mk
x = torch.randn(4, 3)
for _ in range(3):
    mk.mix(x, "flip", 0.5)
with mk.use_backend("reference"):
    mk.mix(x, "flip", 0.5)
mk.mix(x, "flip", 0.5)
"""


def test_debug_logs_the_backend_when_it_changes():
    run = subprocess.run(
        [sys.executable, "-c", DEBUGGED], capture_output=True, text=True, env={**os.environ, "MIXUPE_DEBUG": "1"}
    )
    default = backends.serving("cpu")
    names = [default] if default == "reference" else [default, "reference", default]
    assert run.stderr.splitlines() == [f"mixupe_kernels: mix on CPU: backend {name}" for name in names]
    run = subprocess.run([sys.executable, "-c", DEBUGGED], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_debug_logs_the_path_of_the_loss():
    code = """
import torch
import mixupe_kernels as mk
logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
for penalty in ("abs", torch.abs, "abs"):
    mk.mixupe_loss(logits, labels, eta=0.1, penalty=penalty)
mk.linear_mixupe_loss(logits, torch.randn(5, 3), labels, eta=0.1)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "MIXUPE_DEBUG": "1"}
    )
    said = [line for line in run.stderr.splitlines() if "loss: " in line]
    paths = ["loss: fused", "loss: composed", "loss: fused", "linear loss: linear"]
    assert said == [f"mixupe_kernels: {path}" for path in paths], run.stderr


def test_import_does_not_ask_for_a_cuda_device():
    """The driver does not survive a fork once it is initialised, and data loaders fork."""
    code = """
import torch
def asked(*_):
    raise AssertionError("asked for a CUDA device")
torch.cuda.is_available = torch.cuda.device_count = torch._C._cuda_getDeviceCount = asked
torch.backends.cuda.is_built = lambda: True
import mixupe_kernels as mk
mk.mixupe_loss(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), eta=0.1)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_doctor_names_every_backend(capsys):
    assert doctor.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for backend in backends.BACKENDS:
        assert (f"backend {backend.name} " in printed) == backend.listed
    for reason in backends.missing_backends().values():
        assert reason in printed
    assert doctor.main([]) == 2


IMPORT_PROBE = """
import sys
import torch
import mixupe_kernels
print(*[m for m in ("triton", "matplotlib", "sklearn", "numpy.testing", "rich", "scipy") if m in sys.modules])
"""


def test_import_is_light():
    ours, before = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        for code in (IMPORT_PROBE, IMPORT_PROBE.replace("import mixupe_kernels\n", ""))
    )
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == before.stdout  # nothing that torch had not imported
