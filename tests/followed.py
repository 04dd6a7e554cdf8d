"""What of our Python a call runs: the budgets of calls and files are counted with it."""

import sys
from collections.abc import Callable
from pathlib import Path

import mixupe_kernels

PACKAGE = Path(mixupe_kernels.__file__).parent


def followed(function: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, function) of every call of this package's Python that ``function()`` makes, in order.

    Files are relative to the package. A backward pass counts if autograd runs it on this thread, as it does on the CPU.
    """
    calls = []

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            calls.append((str(path.relative_to(PACKAGE)), frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls
