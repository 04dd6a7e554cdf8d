"""Runs tests under other versions of torch and Triton: `make test-matrix`, or `make test-matrix LEG=torch-2.10` for one.

A leg has an environment of its own, made from requirements/LEG.lock and kept while that is unchanged; one without such a
file has that of development. Its tests run in a
copy of the sources, in which a wheel's package replaces the checkout's. The torch of development builds that wheel:
every torch must load the same libraries. A leg that says ``builds`` then tests a wheel that its own torch builds.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MATRIX = ROOT / ".matrix"
# Environments take 20 GB and ten minutes; checkouts on one machine can share them.
ENVIRONMENTS = Path(os.environ.get("MIXUPE_ENVIRONMENTS") or MATRIX / "environments")


class Run(NamedTuple):
    modules: str  # of tests, or folders of them; all of them if empty
    interpreted: bool = False
    thorough: bool = False
    sanitized: bool = False
    libraries: bool = False  # all of them must be there


class Leg(NamedTuple):
    runs: tuple[Run, ...]
    builds: bool = False
    emulates: bool = False  # CUDA's kernels on the host
    python: str = ""  # the version of its interpreter; that of development if empty
    sanitizes: bool = False  # the compiled backend, by AddressSanitizer and UndefinedBehaviorSanitizer
    shares: str = ""  # the leg whose environment it has


# What meets torch's interfaces; what measures, trains or compiles for other devices is of the legs that have the means.
TORCH = Run(
    "ops integrations batch test_transforms test_loss test_loss_use test_linear test_training test_metrics "
    "test_mixed_target test_exact test_penalty test_ignored test_manifold"
)
COMPILED = Run("test_compiled test_loss test_loss_use test_linear")
TRITON = (Run("test_triton_aot"), Run("ops test_triton_interpreter", interpreted=True))
LEGS = {
    "torch-2.10": Leg((TORCH,)),
    "torch-2.14": Leg((Run(""), TRITON[1]), builds=True),
    "torch-2.15": Leg((TORCH,)),
    "triton-3.6": Leg(TRITON),
    "triton-3.8": Leg(TRITON),
    "libraries": Leg((Run("", libraries=True),)),
    "emulation": Leg((Run("ops test_emulated test_cuda_build", thorough=True),), emulates=True),
    "experiments": Leg((Run("experiments", thorough=True, libraries=True),), shares="libraries"),
    "borrowed-gpu": Leg((Run("test_borrowed_gpu", thorough=True), COMPILED), python="3.12"),
    "sanitizers": Leg((Run("ops test_fuzz", sanitized=True),), sanitizes=True),
}


def call(*command, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def with_tools(python: Path) -> str:
    """PATH with the commands of an environment first: cmake and ninja, among others."""
    return os.pathsep.join([str(python.parent), os.environ["PATH"]])


def locked(path: Path) -> str:
    """The lines of a lock file and of those it includes."""
    lines = path.read_text().splitlines()
    return "\n".join(locked(path.parent / line[3:]) if line.startswith("-r ") else line for line in lines)


def interpreter(version: str) -> str:
    """A Python of this version: of PATH, or of pyenv, whose own commands run only what its settings allow."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    tried = [f"python{version}", *sorted(map(str, pyenv.glob(f"versions/{version}*/bin/python{version}")))]
    for python in tried if version else [sys.executable]:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([python, "-m", "venv", "--help"], check=True, capture_output=True)
            return python
    sys.exit(f"this leg needs Python {version}, found none: none of {', '.join(tried)} runs")


def environment(leg: str) -> Path:
    """The Python of a leg's environment, which is made if there is none for this lock file."""
    lock = ROOT / "requirements" / f"{leg}.lock"
    if not lock.exists():
        return Path(sys.executable)
    content, version = locked(lock), LEGS[leg].python
    folder = ENVIRONMENTS / f"{leg}-{hashlib.sha256((content + version).encode()).hexdigest()[:8]}"
    python, ready = folder / "bin/python", folder / ".ready"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another checkout may be making the same one
        if not ready.exists():
            call(interpreter(version), "-m", "venv", "--clear", folder)
            # The lock file alone says which versions: a machine may cap torch.
            unconstrained = {**os.environ, "PIP_CONSTRAINT": os.devnull}
            (torch,) = re.findall(r"^torch==.*", content, re.MULTILINE)
            for what in ([torch], ["-r", lock]):
                call(python, "-m", "pip", "install", "--quiet", *what, env=unconstrained)
            ready.touch()
    return python


def copy_sources(folder: Path) -> None:
    """The checkout's files that git knows or would add, in a folder without any others but what a build left there."""
    if folder.exists():
        for old in folder.iterdir():
            if old.name != "build":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def build_wheel(python: Path, folder: Path) -> Path:
    """A wheel of the checkout, built with the torch of an environment."""
    source, wheels = folder / "source", folder / "wheel"
    copy_sources(source)
    for stale in (wheels, *source.glob("build/lib*"), *source.glob("build/bdist*")):
        shutil.rmtree(stale, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
    call(python, "-m", "pip", "wheel", *options, source, env={**os.environ, "PATH": with_tools(python)})
    (wheel,) = wheels.glob("*.whl")
    return wheel


def install(name: str, python: Path, wheel: Path) -> Path:
    """The folder that a leg's tests run in: the sources, with the package of the wheel in place of the checkout's."""
    folder = MATRIX / name / "checkout"
    copy_sources(folder)
    shutil.rmtree(folder / "mixupe_kernels")
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    check = "import mixupe_kernels as mk; assert 'cpp' in mk.available_backends(), mk.backends.missing_backends()"
    call(python, "-c", check, cwd=folder)
    return folder


def build_emulated(python: Path, folder: Path) -> None:
    """The library of the tests' backend ``cuda_emulated``, in the package that a leg's tests run on."""
    build, variables = folder / "build/emulated", {**os.environ, "PATH": with_tools(python)}
    call("cmake", "-S", folder, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={python}", env=variables)
    call("cmake", "--build", build, "--target", "_cuda_emulated", env=variables)


def build_sanitized(python: Path, folder: Path) -> None:
    """The library of the backend ``cpp`` with sanitizers, in place of the wheel's. It has no clones: nothing needs a newer CPU."""
    variables = {**os.environ, "PATH": with_tools(python)}
    call("cmake", "--preset", "sanitize", f"-DPython_EXECUTABLE={python}", cwd=folder, env=variables)
    call("cmake", "--build", folder / "build/sanitize", "--target", "_cpu", env=variables)
    shutil.copy2(folder / "build/sanitize/mixupe_kernels/_cpu.so", folder / "mixupe_kernels/_cpu.so")


def of_sanitizers() -> dict[str, str]:
    """The variables of a process that loads such a library. Python itself leaks what it keeps to its end.

    libstdc++ has to be there from the start, too, or AddressSanitizer finds no way to throw, and the first refusal ends the process.
    """

    def path_of(library: str) -> str:
        command = [os.environ.get("CXX", "c++"), f"-print-file-name={library}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    libraries = " ".join(map(path_of, ("libasan.so", "libstdc++.so.6")))
    return {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def files_of(run: Run, root: Path) -> list[Path]:
    """The files, or folders, of a run's tests, wherever below tests/ they are."""
    found = {
        module: [path for name in (module, f"{module}.py") for path in root.glob(f"tests/**/{name}")]
        for module in run.modules.split()
    }
    if wrong := {module: files for module, files in found.items() if len(files) != 1}:
        raise FileNotFoundError(f"each module of the matrix must be one file or folder, got {wrong}")
    return [file for (file,) in found.values()] or [root / "tests"]


def run_tests(python: Path, folder: Path, run: Run, builds: bool = False) -> tuple[int, str]:
    """Pytest's exit status and its last line."""
    command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *files_of(run, folder)]
    variables = {**os.environ, "PATH": with_tools(python), "PYTHONPATH": str(folder)}
    variables["OMP_WAIT_POLICY"] = "PASSIVE"  # see the Makefile
    if builds:
        variables["MIXUPE_CUDA_BUILT"] = "1"
    if run.interpreted:
        variables["TRITON_INTERPRET"] = "1"
    if run.libraries:
        variables |= {"MIXUPE_LIBRARIES": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if run.thorough:
        variables["MIXUPE_THOROUGH"] = "1"
    if run.sanitized:
        command += ["-k", "cpp or test_random_calls"]
        variables |= {**of_sanitizers(), "MIXUPE_FUZZ": "400"}
    last = ""
    with subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def main(names: list[str]) -> int:
    if unknown := set(names) - set(LEGS):
        sys.exit(f"LEG must be one of {', '.join(LEGS)}, got {', '.join(unknown)}")
    development = build_wheel(Path(sys.executable), MATRIX / "development")
    failed, summary = False, []
    for name in names or LEGS:
        print(f"== {name}", flush=True)
        leg = LEGS[name]
        python = environment(leg.shares or name)
        folder = install(name, python, development)
        if leg.builds:
            folder = install(name, python, build_wheel(python, MATRIX / name))
        if leg.emulates:
            build_emulated(python, folder)
        if leg.sanitizes:
            build_sanitized(python, folder)
        for run in leg.runs:
            status, last = run_tests(python, folder, run, leg.builds)
            failed |= status != 0
            summary.append(f"{name}, {run.modules or 'all tests'}: {last}, exit status {status}")
    print("==", *summary, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
