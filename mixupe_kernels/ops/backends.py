"""The backends that stand behind ``torch.ops.mixupe``, and what to do to get a missing one.

The dispatcher is the only table: the reference is registered for every device by ``ops``; the compiled library takes
the CPU key as it loads; on CUDA Triton takes the key where it can, else the compiled library. ``use_backend`` puts
another backend's functions on top, for as long as its block runs.
"""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import operators, reference

_PACKAGE = Path(__file__).parents[1]


def _load_library(name: str) -> str:
    """Load a compiled library; return why it could not be, or an empty string."""
    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        log = _PACKAGE / "_build_log.txt"
        reason = log.read_text().strip() if log.exists() else "install with a C++ compiler, see README"
        return f"{path.name} is not built: {reason}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return ""


def serving(device: torch.device | str) -> str:
    """The backend that serves tensors on ``device`` now."""
    key = torch.device(device).type.upper()
    if key in _table.serving:
        return _table.serving[key]
    compiled = {"CPU": "cpp", "CUDA": "cuda"}.get(key)
    return compiled if compiled in available_backends() else "reference"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return ""


# Compiled backend → why it cannot be used here; an empty string where it can. Loading one registers its kernels.
_missing_library = {
    "cpp": _load_library("_cpu"),
    "cuda": _load_library("_cuda") if torch.cuda.is_available() else "no CUDA device",
}


def missing_backends() -> dict[str, str]:
    """Each backend that cannot be used here, with the reason."""
    reasons = {"reference": "", **_missing_library, "triton": _why_no_triton()}
    return {name: reasons[name] for name in ("reference", "cpp", "triton", "cuda") if reasons[name]}


def available_backends() -> list[str]:
    """Names of the backends that work here, for :func:`use_backend`.

    ``"reference"`` is plain PyTorch and always there; ``"cpp"`` runs on CPU tensors, ``"triton"`` and ``"cuda"`` on CUDA
    tensors (``"triton"`` on CPU tensors too where the environment has TRITON_INTERPRET=1).
    """
    return [name for name in ("reference", "cpp", "triton", "cuda") if name not in missing_backends()]


def _functions(name: str) -> dict[str, Callable]:
    """What to put over the compiled kernels of a dispatch key; nothing, where they are what is wanted."""
    if name == "reference":
        return {operator: getattr(reference, operator) for operator in operators()}
    if name == "triton":
        return importlib.import_module("mixupe_kernels.ops.triton").KERNELS
    return {}


# Dispatch keys each backend serves.
_KEYS = {"reference": ("CPU", "CUDA"), "cpp": ("CPU",), "cuda": ("CUDA",), "triton": ("CUDA",)}


class _Table:
    """Which backend serves which dispatch key, and the registrations that make it so."""

    def __init__(self):
        self.serving = {}
        self.library = None

    def install(self, serving: dict[str, str]) -> None:
        functions = [(key, _functions(name)) for key, name in serving.items()]
        if self.library is not None:
            self.library._destroy()
        self.serving, self.library = serving, torch.library.Library("mixupe", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # taking a key over is what is asked for
            for key, operators in functions:
                for operator, function in operators.items():
                    self.library.impl(operator, function, key, allow_override=True)


_table = _Table()
if torch.cuda.is_available() and not _why_no_triton():
    _table.install({"CUDA": "triton"})


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block's operators on one backend, whatever the default for the device is.

    The switch is process-wide, as the dispatcher's table is. Tensors on a device that the backend does not serve keep
    their default. A graph compiled before the block calls through the dispatcher and so follows the switch.

    Args:
        name: one of :func:`available_backends`.

    Raises:
        ValueError: for another name; the message says why a known backend is missing here.
    """
    if name not in available_backends():
        reason = missing_backends().get(name)
        detail = f": {reason}" if reason else ""
        options = ", ".join(map(repr, available_backends()))
        raise ValueError(f"backend must be one of {options}, got {name!r}{detail}")
    keys = ("CPU", "CUDA") if name == "triton" and _interpreted() else _KEYS[name]
    before = _table.serving
    _table.install({**before, **dict.fromkeys(keys, name)})
    try:
        yield
    finally:
        _table.install(before)
