"""Makes what is released, in dist/, and checks it: `make dist`, or `make dist LEG="torch-2.10 torch-2.15"` for other torches too.

An sdist, and from it two wheels: one with the libraries, for every Python from 3.10 and every torch from 2.10 on Linux, and
one of plain Python for everywhere else. Each is installed beside nothing but torch, in an environment made for that, and
trains a step there; with LEG also in the environments of the matrix's legs.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import torch

from tests import matrix

ROOT = matrix.ROOT
DIST = ROOT / "dist"
WORK = ROOT / "build" / "dist"
MAX_BYTES = 2 * 2**20  # of a wheel without CUDA
LIBRARIES = ("mixupe_kernels/_cpu.so", "mixupe_kernels/_cuda.so")
# Whoever has torch has these; torch's own wheel brings them.
FROM_TORCH = ("libtorch*", "libc10*", "libcudart*")

PROBE = """
import sys, torch, mixupe_kernels as mk
from mixupe_kernels import __main__ as doctor
from mixupe_kernels.ops import backends
backend, folder = sys.argv[1:]
assert mk.__file__.startswith(folder), (mk.__file__, folder)
assert doctor.main(["doctor"]) == 0
assert mk.available_backends() == ([backend] if backend == "reference" else [backend, "reference"])
assert backends.serving("cpu") == backend
model = mk.split_batch_norm(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = [parameter.clone() for parameter in model.parameters()]
x, target = mk.MixupE(alpha=1.0, clean_fraction=1 / 4)(torch.randn(16, 6), torch.randint(4, (16,)))
loss = mk.MixupELoss(eta=1e-3)(mk.forward_mixupe(model, x, target), target)
loss.backward()
optimizer.step()
assert loss.isfinite() and not any(map(torch.equal, before[:1], model.parameters()))
print(f"a step with {backend} on torch {torch.__version__}, Python {sys.version.split()[0]}")
"""


def make_sdist(folder: Path) -> Path:
    """The sdist of the sources in ``folder``, left in its dist/."""
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    matrix.call(sys.executable, "-c", code, cwd=folder, stdout=subprocess.DEVNULL)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return sdist


def make_wheel(source: Path, folder: Path, **variables: str) -> Path:
    """A wheel of an sdist or of a folder of sources."""
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", folder]
    environment = {**os.environ, "PATH": matrix.with_tools(Path(sys.executable)), **variables}
    matrix.call(sys.executable, "-m", "pip", "wheel", *options, source, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def for_manylinux(wheel: Path, folder: Path) -> Path:
    """The wheel under the tag of the oldest Linux that it runs on."""
    excluded = [f"--exclude={name}" for name in FROM_TORCH]
    environment = {**os.environ, "PATH": matrix.with_tools(Path(sys.executable))}
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel]
    matrix.call(*command, env=environment)
    (repaired,) = folder.glob("*.whl")
    return repaired


def metadata(wheel: Path, name: str) -> Message:
    """A file of the wheel's dist-info: METADATA or WHEEL."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return Parser().parsestr(archive.read(path).decode())


def check_wheel(wheel: Path) -> None:
    """Raise ValueError for a wheel that should not be released."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = {name: archive.read(name) for name in names if name.endswith(".so")}
    version, python, abi, platform = wheel.stem.split("-")[1:]
    info = metadata(wheel, "METADATA")
    faults = {
        f"one wheel serves every Python 3, and this is for {python}-{abi}": (python, abi) == ("py3", "none"),
        f"only what auditwheel has tagged runs on other machines, and this is for {platform}": (
            platform == "any" or all(tag.startswith("manylinux") for tag in platform.split("."))
        ),
        f"the tag says {platform}, and it holds {sorted(libraries) or 'no library'}": (
            (platform == "any") == (not libraries)
        ),
        f"{sorted(libraries)} are not all the package's": set(libraries) <= set(LIBRARIES),
        "a library calls Python, and so is of one version of it": not any(
            symbol in library for library in libraries.values() for symbol in (b"PyObject_", b"Py_Initialize")
        ),
        f"{wheel.stat().st_size} bytes are more than {MAX_BYTES}": (
            LIBRARIES[1] in libraries or wheel.stat().st_size <= MAX_BYTES
        ),
        "py.typed is missing": "mixupe_kernels/py.typed" in names,
        "it holds more than the package": {name.split("/")[0].split("-")[0] for name in names} == {"mixupe_kernels"},
        f"the name says {version}, the metadata {info['Version']}": version == info["Version"],
        "it has no description": "MixupE" in str(info.get_payload()),
    }
    if wrong := [fault for fault, fine in faults.items() if not fine]:
        raise ValueError(f"{wheel.name}: {'; '.join(wrong)}")


def backend_of(wheel: Path) -> str:
    return "reference" if wheel.stem.endswith("-any") else "cpp"


def fresh_environment(folder: Path) -> Path:
    """The Python of an environment with nothing but the torch that runs this."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin/python"
    version = torch.__version__.split("+")[0]
    matrix.call(python, "-m", "pip", "install", "--quiet", f"torch=={version}", env=unconstrained())
    return python


def unconstrained() -> dict[str, str]:
    return {**os.environ, "PIP_CONSTRAINT": os.devnull}  # a machine may cap torch


def try_wheel(python: Path, wheel: Path, folder: Path) -> None:
    """Install a wheel beside what an environment has, and train a step with it, somewhere else than the sources."""
    site = folder / wheel.stem
    shutil.rmtree(site, ignore_errors=True)
    matrix.call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    matrix.call(python, "-c", PROBE, backend_of(wheel), site, cwd=folder, env={**os.environ, "PYTHONPATH": str(site)})


def main(legs: list[str]) -> int:
    if unknown := set(legs) - set(matrix.LEGS):
        sys.exit(f"LEG must be among {', '.join(matrix.LEGS)}, got {', '.join(sorted(unknown))}")
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    source = WORK / "source"
    matrix.copy_sources(source)
    sdist = make_sdist(source)
    linux = for_manylinux(make_wheel(sdist, WORK / "linux"), WORK / "manylinux")
    pure = make_wheel(sdist, WORK / "pure", MIXUPE_PURE_PYTHON="1")
    wheels = [linux, pure]
    for wheel in wheels:
        check_wheel(wheel)
    pythons = {"nothing but torch": fresh_environment(WORK / "fresh")}
    pythons |= {leg: matrix.environment(leg) for leg in legs}
    for name, python in pythons.items():
        for wheel in wheels:
            print(f"== {wheel.name}, {name}", flush=True)
            try_wheel(python, wheel, WORK)
    # Resolved as a user's pip does: torch is there, so nothing is fetched.
    fresh = pythons["nothing but torch"]
    matrix.call(fresh, "-m", "pip", "install", "--quiet", "--no-index", linux, cwd=WORK)
    matrix.call(fresh, "-m", "pip", "check", cwd=WORK)
    print("==")
    for made in (sdist, *wheels):
        shutil.copy2(made, DIST)
        print(f"dist/{made.name}: {made.stat().st_size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
