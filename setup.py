"""Builds what CMakeLists.txt describes, for any Python and any torch from 2.10 on: the wheel's tag names the platform alone.

On Linux with a C++ compiler the libraries are built, and a build that fails ends the install with its reason. Elsewhere, and
with MIXUPE_PURE_PYTHON=1, the wheel is plain Python: every operator has its definition in plain PyTorch, and
`python -m mixupe_kernels doctor` says why there are no libraries.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
LOG = "_build_log.txt"
COMPILERS = ("c++", "g++", "clang++")


def why_pure() -> str:
    """The reason to build no libraries; empty if they are to be built."""
    if os.environ.get("MIXUPE_PURE_PYTHON") == "1":
        return "MIXUPE_PURE_PYTHON=1 was set when the package was built"
    if not sys.platform.startswith("linux"):
        return f"libraries are built on Linux only, and this was built on {sys.platform}"
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        return f"there was no C++ compiler ({', '.join(COMPILERS)}) when the package was built"
    return ""


PURE = why_pure()


class Package(build_py):
    """The Python files, and why there are no libraries beside them."""

    def run(self):
        super().run()
        log = (ROOT if self.editable_mode else Path(self.build_lib)) / "mixupe_kernels" / LOG
        log.unlink(missing_ok=True)
        if PURE:
            log.write_text(f"{PURE}\n")


class Libraries(build_ext):
    """Runs cmake once for all libraries. An editable install also gets the bindings of csrc/row.h that its tests use."""

    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "mixupe_kernels"
        package.mkdir(parents=True, exist_ok=True)
        tools = {name: shutil.which(name) for name in ("cmake", "ninja")}
        if missing := [name for name, path in tools.items() if path is None]:
            self.fail(f"{' and '.join(missing)} not found: pip install cmake ninja")
        if not self.inplace:
            for old in package.glob("*.so"):  # left in build/ by another Python's wheel
                old.unlink()
        build = ROOT / "build" / "package"
        bindings = self.inplace and importlib.util.find_spec("pybind11") is not None
        arguments = [f"-DMIXUPE_OUTPUT={package}", f"-DPython_EXECUTABLE={sys.executable}"]
        arguments.append(f"-DMIXUPE_BINDINGS={'ON' if bindings else 'OFF'}")
        self.call(tools["cmake"], "-S", ROOT, "-B", build, "-G", "Ninja", "--fresh", *arguments)
        self.call(tools["cmake"], "--build", build)

    def call(self, *command) -> None:
        print(*command, flush=True)
        parts = [str(part) for part in command]
        done = subprocess.run(parts, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            self.fail(f"{' '.join(parts[:2])} … failed, see above")

    def fail(self, reason: str) -> None:
        """End the install: what is said here is the last that pip shows of the build."""
        raise SystemExit(
            f"mixupe_kernels: the compiled backend was not built: {reason}\n"
            "mixupe_kernels: MIXUPE_PURE_PYTHON=1 installs the package without it, on plain PyTorch."
        )

    def get_outputs(self):
        return []

    def get_source_files(self):
        return []


class Wheel(bdist_wheel):
    """The libraries call torch's stable ABI and know no Python: one wheel of a platform serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_py": Package, "build_ext": Libraries, "bdist_wheel": Wheel},
    ext_modules=[] if PURE else [Extension("mixupe_kernels._cpu", [])],
    # What building takes beyond pyproject.toml's setuptools. A wheel of plain Python takes no torch of its own.
    setup_requires=[] if PURE else ["torch>=2.10", "cmake>=3.24", "ninja"],
)
