"""Values that change from epoch to epoch."""

import math

from .. import checks


class LinearRamp:
    """From ``start`` at ``first_epoch`` to ``stop`` at ``last_epoch``, linearly, and constant before and after.

    Args:
        start, stop: the values, finite.
        first_epoch, last_epoch: numbers with 0 <= first_epoch < last_epoch.

    Raises:
        TypeError, ValueError: for another type or value.

    Calling it with an epoch, a number >= 0 that may be fractional, returns the value.
    """

    def __init__(self, start: float, stop: float, first_epoch: float = 0, *, last_epoch: float):
        self.start = checks.number("start", start, "a finite number", math.isfinite)
        self.stop = checks.number("stop", stop, "a finite number", math.isfinite)
        self.first_epoch = checks.non_negative("first_epoch", first_epoch)
        self.last_epoch = checks.number(
            "last_epoch", last_epoch, f"a number > first_epoch = {self.first_epoch:g}", lambda v: v > self.first_epoch
        )

    def __call__(self, epoch: float) -> float:
        epoch = checks.non_negative("epoch", epoch)
        done = (epoch - self.first_epoch) / (self.last_epoch - self.first_epoch)
        done = min(max(done, 0.0), 1.0)
        return self.start * (1 - done) + self.stop * done

    def __repr__(self) -> str:
        return f"LinearRamp({self.start:g}, {self.stop:g}, {self.first_epoch:g}, last_epoch={self.last_epoch:g})"
