"""What was built says so; without a compiler the package installs and works on the reference."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels.ops import backends

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
    facts = backends.build_facts()
    if not facts:
        pytest.skip("there is no compiled library: no C++ compiler")
    assert set(facts) == {"compiler", "simd_level", "hardware_threads", "stable_abi_target", "cuda_architectures"}
    assert all(facts.values())
    expected = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}.get(torch.backends.cpu.get_cpu_capability())
    if expected and "GNU" in facts["compiler"]:
        assert facts["simd_level"].startswith(expected)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiler_means_a_compiled_backend():
    assert "cpp" in mk.available_backends()


def install(directory, **environment):
    """Pip's run, for a copy of the sources, so that nothing built here is picked up, into ``directory``/site."""
    source = directory / "source"
    ignore = shutil.ignore_patterns("*.so", "build", ".*", "results", "*.egg-info", "__pycache__", "_build_log.txt")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    return subprocess.run(
        [*command, directory / "site", source], env={**os.environ, **environment}, capture_output=True, text=True
    )


def probe(directory):
    """What the package in ``directory``/site says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(directory / "site") in done.stdout
    return done.stdout


def no_compiler(directory):
    """PATH with Python's and git's folders of commands but no compiler, and without CXX."""
    (directory / "bin").mkdir()
    return {"PATH": str(directory / "bin"), "CXX": ""}


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        (lambda _: {"MIXUPE_PURE_PYTHON": "1"}, "MIXUPE_PURE_PYTHON=1 was set"),
        (no_compiler, "there was no C++ compiler"),
    ],
    ids=["asked for", "no compiler"],
)
def test_an_install_without_libraries_works_and_doctor_says_why(tmp_path, variables, why):
    done = install(tmp_path, **variables(tmp_path))
    assert done.returncode == 0, done.stderr
    printed = probe(tmp_path)
    assert "['reference']" in printed
    assert why in printed


def test_a_build_that_fails_ends_the_install_and_says_so_last(tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = install(tmp_path, CXX=str(compiler))
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert "this compiler is broken" in printed
    *_, why, remedy = [line for line in printed.splitlines() if "mixupe_kernels: " in line]
    assert "the compiled backend was not built: " in why
    assert "MIXUPE_PURE_PYTHON=1 installs the package without it" in remedy
    assert not (tmp_path / "site" / "mixupe_kernels").exists()


def test_missing_tools_are_named(tmp_path):
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.symlink_to("/bin/true")
    done = install(tmp_path, PATH=str(compiler.parent), CXX="")
    assert done.returncode != 0
    assert "cmake and ninja not found: pip install cmake ninja" in done.stderr
