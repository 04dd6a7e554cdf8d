"""MIXUPE_DEBUG=1 in the environment: log which backend and which path ran, to the logger ``mixupe_kernels``.

A caller writes ``if debug.ON: debug.ran("loss", "fused")``, so that nothing is paid where it is off.
"""

import logging
import os

import torch

ON = os.environ.get("MIXUPE_DEBUG") == "1"

_logger = logging.getLogger("mixupe_kernels")
_last: dict[str, str] = {}


def ran(what: str, how: str) -> None:
    """Log that ``how`` ran ``what``, if it is another than the last time: a training run gives a few lines, not millions."""
    if torch.compiler.is_compiling() or _last.get(what) == how:
        return
    if not _logger.hasHandlers():  # a program that configured logging keeps its own
        logging.basicConfig(format="%(name)s: %(message)s")
        _logger.setLevel(logging.DEBUG)
    _last[what] = how
    _logger.debug("%s: %s", what, how)
