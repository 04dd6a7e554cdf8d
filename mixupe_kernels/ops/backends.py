"""The backends that stand behind ``torch.ops.mixupe``: one table, why one is missing, and the switch between them.

The dispatcher finds the kernel of a call. The reference is registered for every device by ``ops``; a compiled library takes
its dispatch key as it loads. Every other choice goes through *switches*: Python kernels, registered once for a key and never
taken back, that look up which backend serves it. A key whose compiled library serves it has none until ``use_backend`` asks
for another backend; from then on a call costs 2 µs more (torch 2.13).
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import debug
from . import registration
from .registration import operators

_PACKAGE = Path(__file__).parents[1]
KEYS = ("CPU", "CUDA")  # dispatch keys with more than the reference

Functions = dict[str, Callable[..., Any]]


class Unavailable(Exception):
    """A backend cannot be used here; the message says why."""


class Backend(NamedTuple):
    """A backend.

    Attributes:
        name: as ``use_backend`` takes it.
        keys: dispatch keys it may serve by default. The first backend of the table that works serves a key.
        functions: returns operator → function of the reference's arguments; raises :class:`Unavailable`. An operator that is
            not there runs on the reference.
        on_request: dispatch keys that it serves inside ``use_backend`` only.
        listed: whether users are told of it. What only tests use is not, and loads when ``use_backend`` names it.
    """

    name: str
    keys: tuple[str, ...]
    functions: Callable[[], Functions]
    on_request: tuple[str, ...] = ()
    listed: bool = True


def _triton() -> Functions:
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("the triton package is not installed")
    if not _INTERPRETED and not torch.cuda.device_count():
        raise Unavailable("no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")
    try:
        return importlib.import_module("mixupe_kernels.ops.triton").KERNELS
    except ImportError as error:
        raise Unavailable(f"the triton package does not import: {error}") from error


def _cuda() -> Functions:
    if not torch.cuda.device_count():
        raise Unavailable("no CUDA device")
    return _compiled("cuda", "_cuda", "CUDA")


def _cuda_emulated() -> Functions:
    """Less what the CUDA library leaves to PyTorch's kernels: on the CPU, another backend's stands under that name.

    A key of its own would tell the two apart, and put a switch of 2 µs before each call, which no CUDA library has and
    ``bench.host`` would count.
    """
    functions = _compiled("cuda_emulated", "_cuda_emulated", "CPU")
    return {name: function for name, function in functions.items() if not name.startswith("normalise_apart")}


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The table. A further backend is one line here, and the file that its functions are in.
BACKENDS = (
    Backend("cpp", ("CPU",), lambda: _compiled("cpp", "_cpu", "CPU")),
    Backend("triton", ("CUDA",), _triton, on_request=("CPU",) if _INTERPRETED else ()),
    Backend("cuda", ("CUDA",), _cuda),
    Backend("cuda_emulated", (), _cuda_emulated, on_request=("CPU",), listed=False),
    Backend("reference", KEYS, registration.references),
)


class From(NamedTuple):
    """A row of ``BY_SIZE``: from so many elements of a call's largest tensor on, this backend serves it."""

    elements: int
    backend: str


# Dispatch key → operator → the backends that serve it by default, by size; what is not here, and what names a backend that is
# missing, has the first of BACKENDS that works. No GPU has run both of CUDA's yet: ``python -m bench gpu`` writes what fills this.
BY_SIZE: dict[str, dict[str, tuple[From, ...]]] = {"CUDA": {}}


def _truncated(path: Path) -> bool:
    """Whether an ELF file ends before its segments do. The loader would map them, and reading one would kill the process."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:  # 64 bits, little-endian
        return False
    table, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    if table + size * count > len(data):
        return True
    segments = (struct.unpack_from("<QQQQ", data, table + size * index + 8) for index in range(count))
    return any(offset + stored > len(data) for offset, _, _, stored in segments)


def _load(name: str, key: str) -> Functions:
    """Load a compiled library of the package, and return the kernels that it registered for a dispatch key."""
    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        log = _PACKAGE / "_build_log.txt"
        # A compiler writes in the locale's encoding.
        reason = log.read_text("utf-8", errors="replace").strip() if log.exists() else ""
        raise Unavailable(f"{path.name} is not built: {reason or 'install with a C++ compiler, see README'}")
    try:
        if _truncated(path):
            raise OSError(f"{path}: the file is truncated")
        torch.ops.load_library(path)
    except OSError as error:
        # torch's own error says only which file it was; the loader's is its cause.
        raise Unavailable(f"{path.name} does not load: {error.__cause__ or error}") from error
    overloads = {operator: getattr(torch.ops.mixupe, operator).default for operator in operators()}
    found = {name: overload for name, overload in overloads.items() if overload.has_kernel_for_dispatch_key(key)}
    if not found:
        raise Unavailable(
            f"{path.name} registers no operator for {key}: it is of another version, or no library of ours"
        )
    return {operator: _boxed(torch.library.get_kernel(overload, key)) for operator, overload in found.items()}


def _boxed(kernel) -> Callable[..., Any]:
    def call(keyset, *args, **kwargs):
        return kernel.call_boxed(keyset, *args, **kwargs)

    call.takes_keyset = True  # type: ignore[attr-defined]
    return call


# Dispatch key → the backend that the dispatcher itself finds there, under the switches.
_native = dict.fromkeys(KEYS, "reference")
_with_switches: set[str] = set()


@functools.cache
def _load_once(backend: str, name: str, key: str) -> Functions | str:
    """The library's kernels, or why there are none."""
    try:
        functions = _load(name, key)
    except Unavailable as why:
        return str(why)
    _native[key] = backend
    _with_switches.discard(key)  # the library has registered its kernels over them
    return functions


def _compiled(backend: str, name: str, key: str) -> Functions:
    found = _load_once(backend, name, key)
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def _why_missing(backend: Backend) -> str:
    try:
        backend.functions()
    except Unavailable as why:
        return str(why)
    return ""


def missing_backends() -> dict[str, str]:
    """Each backend that cannot be used here, with the reason."""
    reasons = {backend.name: _why_missing(backend) for backend in BACKENDS if backend.listed}
    return {name: reason for name, reason in reasons.items() if reason}


def available_backends() -> list[str]:
    """Names of the backends that work here, for :func:`use_backend`.

    ``"reference"`` is plain PyTorch and always there; ``"cpp"`` runs on CPU tensors, ``"triton"`` and ``"cuda"`` on CUDA
    tensors (``"triton"`` on CPU tensors too, if the environment has TRITON_INTERPRET=1). A device is served by the first of
    the list that can.
    """
    return [backend.name for backend in BACKENDS if backend.listed and not _why_missing(backend)]


def backends_for(device: torch.device | str) -> list[str]:
    """Names of the backends for a device's tensors, by default or on request, whether they work here or not."""
    key = torch.device(device).type.upper()
    return [backend.name for backend in BACKENDS if key in backend.keys + backend.on_request]


# The blocks of use_backend that are being run, in the order of their beginnings, and the lock for it and what follows.
_requests: list[Backend] = []
_lock = threading.RLock()
_serving: dict[str, Functions] = {}
_library = torch.library.Library("mixupe", "IMPL")


def _chosen(key: str) -> Backend:
    for backend in reversed(_requests):
        if key in backend.keys + backend.on_request:
            return backend
    return next(backend for backend in BACKENDS if key in backend.keys and not _why_missing(backend))


def serving(device: torch.device | str) -> str:
    """The backend that serves tensors on ``device`` now."""
    key = torch.device(device).type.upper()
    with _lock:
        return _chosen(key).name if key in KEYS else "reference"


def _serve() -> None:
    """Make the switches of each key find the backend that was chosen for it; put them in if they are needed."""
    with _lock:
        for key in KEYS:
            backend = _chosen(key)
            if backend.name == _native[key] and key not in _with_switches and not debug.ON:
                continue
            functions = _functions_of(backend)
            served = {operator: _for_switch(operator, key, backend, functions[operator]) for operator in operators()}
            if not any(key in request.keys + request.on_request for request in _requests):
                served |= {
                    operator: _sized(operator, key, rows, served[operator])
                    for operator, rows in BY_SIZE.get(key, {}).items()
                }
            _serving[key] = served
            _put_in_switches(key)


def _functions_of(backend: Backend) -> Functions:
    """The backend's function of each operator, and the reference's where it has none."""
    return {**registration.references(), **backend.functions()}


def _sized(operator: str, key: str, rows: tuple[From, ...], default: Callable[..., Any]) -> Callable[..., Any]:
    """The operator by the rows of ``BY_SIZE``; ``default`` below the first of them."""
    named = {backend.name: backend for backend in BACKENDS if key in backend.keys and not _why_missing(backend)}
    functions = [
        (elements, _for_switch(operator, key, named[name], _functions_of(named[name])[operator]))
        for elements, name in rows
        if name in named
    ]

    def call(keyset, *args, **kwargs):
        size = max(value.numel() for value in args if isinstance(value, torch.Tensor))
        function = default
        for elements, of_size in functions:
            if size >= elements:
                function = of_size
        return function(keyset, *args, **kwargs)

    return call


def _for_switch(operator: str, key: str, backend: Backend, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a switch calls it: with the call's set of dispatch keys first, and logged if that is asked for."""
    called = (
        function if getattr(function, "takes_keyset", False) else lambda _, *args, **kwargs: function(*args, **kwargs)
    )
    if not debug.ON:
        return called

    def logged(keyset, *args, **kwargs):
        debug.ran(f"{operator} on {key}", f"backend {backend.name}")
        return called(keyset, *args, **kwargs)

    return logged


def _put_in_switches(key: str) -> None:
    if key in _with_switches:
        return
    _with_switches.add(key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # taking a key over is what is asked for
        for operator in operators():
            _library.impl(operator, _switch(operator, key), key, with_keyset=True, allow_override=True)


def _switch(operator: str, key: str) -> Callable[..., Any]:
    def switch(keyset, *args, **kwargs):
        if key not in _serving:
            _serve()
        return _serving[key][operator](keyset, *args, **kwargs)

    return switch


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block's operators on one backend, whatever the default for the device is.

    The switch is process-wide, as backward passes on CUDA run in threads of their own: while several blocks are being run,
    in one thread or in several, the one that began last decides, and when it ends the one before it decides again, in
    whatever order they end. Tensors on a device that the backend does not serve keep their default. A graph compiled before
    the block calls through the dispatcher and so follows the switch.

    Args:
        name: one of :func:`available_backends`.

    Raises:
        ValueError: for another name; the message says why a known backend is missing here.
    """
    backend = next((backend for backend in BACKENDS if backend.name == name), None)
    reason = "" if backend is None else _why_missing(backend)
    if backend is None or reason:
        options = ", ".join(map(repr, available_backends()))
        raise ValueError(f"backend must be one of {options}, got {name!r}{reason and f': {reason}'}")
    request = backend._replace()  # an object of this block's own
    with _lock:
        _requests.append(request)
        _serve()
    try:
        yield
    finally:
        with _lock:
            _requests[:] = [other for other in _requests if other is not request]
            _serve()


def build_facts() -> dict[str, str]:
    """What the compiled CPU library tells of its build; nothing if it does not serve."""
    if _native["CPU"] == "reference":
        return {}
    try:
        told = ctypes.CDLL(str(_PACKAGE / "_cpu.so")).mixupe_build_facts
    except (OSError, AttributeError):  # replaced since it was loaded, by none or by one of another version
        return {}
    told.restype = ctypes.c_char_p
    return dict(line.split("=", 1) for line in told().decode().splitlines())


# Nothing here asks for a CUDA device: the driver, once initialised, does not survive a fork.
_load_once("cpp", "_cpu", "CPU")
if torch.backends.cuda.is_built():
    _load_once("cuda", "_cuda", "CUDA")
    if importlib.util.find_spec("triton") is not None:
        _put_in_switches("CUDA")  # the first call finds out which backend works
if debug.ON:
    for _key in KEYS:
        _put_in_switches(_key)
