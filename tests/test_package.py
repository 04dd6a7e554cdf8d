"""What is released: the files of the sdist, the metadata, and the checks of `make dist`, which itself takes too long here."""

import re
import shutil
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mixupe_kernels as mk
from tests import dist

ROOT = Path(__file__).parent.parent
BUILT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
NAME = f"mixupe_kernels-{mk.__version__}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkout in which a build left its libraries."""
    folder = tmp_path_factory.mktemp("package") / "source"
    shutil.copytree(ROOT, folder, ignore=BUILT)
    for name in ("_cpu.so", "_build.cpython-311-x86_64-linux-gnu.so", "_build_log.txt"):
        (folder / "mixupe_kernels" / name).write_bytes(b"left by a build")
    return folder


@pytest.fixture(scope="module")
def sdist(sources):
    """(names of files, PKG-INFO) of the sdist."""
    with tarfile.open(dist.make_sdist(sources)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        info = archive.extractfile(f"{NAME}/PKG-INFO").read().decode()
    return names, Parser().parsestr(info)


def test_the_sdist_holds_what_builds_and_tests_it(sdist):
    names, _ = sdist
    folders = ("mixupe_kernels", "csrc", "tests", "docs", "requirements")
    needed = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.*")}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"}
    built = re.compile(r"\.so$|\.pyc$|_build_log|(^|/)\.")
    assert {name for name in needed if not built.search(name)} <= names
    assert not [name for name in names if built.search(name)]


def test_the_metadata_says_what_a_user_looks_for(sdist):
    _, info = sdist
    assert (info["Name"], info["Version"]) == ("mixupe_kernels", mk.__version__)
    assert (info["Requires-Python"], info["License-Expression"]) == (">=3.10", "BSD-3-Clause")
    assert info["Description-Content-Type"] == "text/markdown" and "# mixupe_kernels" in info.get_payload()
    extras = {"triton", "integrations", "experiments", "bench", "docs", "test"}
    assert extras <= set(info.get_all("Provides-Extra"))
    assert [need for need in info.get_all("Requires-Dist") if "extra" not in need] == ["torch>=2.10"]


def test_the_version_is_said_once():
    files = [*ROOT.glob("*.*"), *ROOT.glob("requirements/*"), *ROOT.glob("mixupe_kernels/**/*.py")]
    said = re.compile(rf"""version\w*["']?\s*[:=]\s*["']?{re.escape(mk.__version__)}""")
    assert [path.name for path in files if path.is_file() and said.search(path.read_text())] == ["__init__.py"]


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == mk.__version__


def test_a_pure_wheel_says_so_and_takes_no_library_from_the_checkout(sources, tmp_path):
    wheel = dist.make_wheel(sources, tmp_path, MIXUPE_PURE_PYTHON="1")
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    dist.check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert b"MIXUPE_PURE_PYTHON=1" in archive.read("mixupe_kernels/_build_log.txt")
    assert dist.metadata(wheel, "WHEEL")["Root-Is-Purelib"] == "true"


def wheel_of(folder: Path, tag: str, library: bytes = b"", name: str = "mixupe_kernels/_cpu.so") -> Path:
    """A wheel that `make dist` might have made."""
    path = folder / f"mixupe_kernels-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mixupe_kernels/py.typed", "")
        archive.writestr("mixupe_kernels-1.0.dist-info/METADATA", "Version: 1.0\n\nMixupE")
        if library:
            archive.writestr(name, library)
    return path


def test_wheels_as_they_should_be_pass(tmp_path):
    dist.check_wheel(wheel_of(tmp_path, "py3-none-any"))
    dist.check_wheel(wheel_of(tmp_path, "py3-none-manylinux_2_28_x86_64", b"\x7fELF"))


@pytest.mark.parametrize(
    ("tag", "library", "why"),
    [
        ("py3-none-manylinux_2_28_x86_64", b"", "holds no library"),
        ("py3-none-any", b"\x7fELF", "tag says any"),
        ("cp311-cp311-manylinux_2_28_x86_64", b"\x7fELF", "one wheel serves every Python 3"),
        ("py3-none-linux_x86_64", b"\x7fELF", "auditwheel"),
        ("py3-none-manylinux_2_28_x86_64", b"\x7fELF PyObject_Call", "calls Python"),
        ("py3-none-manylinux_2_28_x86_64", b"\x7fELF" + b"0" * dist.MAX_BYTES, "bytes are more than"),
    ],
)
def test_wheels_that_must_not_be_released_are_refused(tmp_path, tag, library, why):
    with pytest.raises(ValueError, match=why):
        dist.check_wheel(wheel_of(tmp_path, tag, library))


def test_a_library_that_is_not_the_packages_is_refused(tmp_path):
    wheel = wheel_of(tmp_path, "py3-none-manylinux_2_28_x86_64", b"\x7fELF", "mixupe_kernels.libs/libgomp.so")
    with pytest.raises(ValueError, match="not all the package's"):
        dist.check_wheel(wheel)


def test_an_unknown_leg_is_refused():
    with pytest.raises(SystemExit, match="LEG must be among torch-2.10, .*, got torch-1.0"):
        dist.main(["torch-1.0"])


def test_the_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "bash .ci/run" in workflow and "make dist" in workflow
    for python in ("3.10", "3.11", "3.12", "3.13"):
        assert f'"{python}"' in workflow and f"Python :: {python}" in (ROOT / "pyproject.toml").read_text()
