"""What was built says so; without a compiler the package installs and works on the reference."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk

ROOT = Path(__file__).parent.parent

PROBE = """
import torch, mixupe_kernels as mk
from mixupe_kernels import __main__ as doctor
print(mk.__file__)
print(mk.available_backends())
x = torch.randn(4, 3)
assert torch.equal(mk.mix(x, "flip", 1.0), x)
loss = mk.mixupe_loss(x.requires_grad_(), torch.tensor([0, 1, 2, 0]), eta=0.1)
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 2, 0])))
doctor.main(["doctor"])
"""


def test_facts():
    build = pytest.importorskip("mixupe_kernels._build", reason="the bindings are not built: no C++ compiler")
    facts = build.facts()
    assert set(facts) == {"compiler", "simd_level", "hardware_threads", "stable_abi_target", "cuda_architectures"}
    assert all(facts.values())
    expected = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}.get(torch.backends.cpu.get_cpu_capability())
    if expected and "GNU" in facts["compiler"]:
        assert facts["simd_level"].startswith(expected)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiler_means_a_compiled_backend():
    assert "cpp" in mk.available_backends()


def install(directory, **environment):
    """The package installed into ``directory`` from a copy of the sources, so that nothing built here is picked up."""
    source = directory / "source"
    ignore = shutil.ignore_patterns("*.so", "build", ".*", "results", "*.egg-info", "__pycache__", "_build_log.txt")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run(
        [*command, directory / "site", source], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory / "site")},
        capture_output=True,
        text=True,
    )
    assert probe.returncode == 0, probe.stderr
    assert str(directory / "site") in probe.stdout
    return probe.stdout


def test_pure_python_install_works_and_doctor_says_why(tmp_path):
    printed = install(tmp_path, MIXUPE_PURE_PYTHON="1")
    assert "['reference']" in printed
    assert "MIXUPE_PURE_PYTHON=1 was set" in printed


def test_a_failing_compiler_leaves_a_working_package(tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    printed = install(tmp_path, CXX=str(compiler))
    assert "['reference']" in printed
    assert "broken" in printed
