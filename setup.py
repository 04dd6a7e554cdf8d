"""Builds what CMakeLists.txt describes. Without a compiler, or if the build fails, the package still works: every
operator has its definition in plain PyTorch. `python -m mixupe_kernels doctor` then shows why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs cmake once for all libraries; they and the log of a failure land in the package."""

    def run(self):
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "mixupe_kernels"
        package.mkdir(parents=True, exist_ok=True)
        log = package / "_build_log.txt"
        log.unlink(missing_ok=True)
        try:
            self.build(package)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "output", None) or str(error)
            log.write_text(f"{reason[-4000:]}\n")
            print(f"mixupe_kernels: no compiled backend, the reference is used instead. {error}", file=sys.stderr)

    def build(self, package: Path) -> None:
        if os.environ.get("MIXUPE_PURE_PYTHON") == "1":
            raise OSError("MIXUPE_PURE_PYTHON=1 was set when the package was installed")
        cmake = shutil.which("cmake")
        if cmake is None or shutil.which("ninja") is None:
            raise OSError("cmake and ninja are needed to build the compiled backends")
        build = ROOT / "build" / "package"
        arguments = [f"-DMIXUPE_OUTPUT={package}", f"-DPython_EXECUTABLE={sys.executable}"]
        self.call(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", "--fresh", *arguments)
        self.call(cmake, "--build", build)

    def call(self, *command) -> None:
        print(*command)
        parts = [str(part) for part in command]
        done = subprocess.run(parts, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, " ".join(map(str, command)), done.stdout)

    def get_outputs(self):
        return []

    def get_source_files(self):
        return []


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    distclass=BinaryDistribution,
    cmdclass={"build_ext": CMakeBuild},
    ext_modules=[Extension("mixupe_kernels._cpu", [])],
)
