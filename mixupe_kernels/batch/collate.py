"""A mixer in the collate function of a data loader."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import default_collate

from .mixup import Mixup


class Collate:
    """What a data loader calls with its samples, in the main process or in workers: a batch of them, mixed.

    Mixing after the transfer to the device is faster, and comes first in what we recommend: workers send the clean rows as
    well, and the CPU mixes. This is for loops that leave no place between loader and model. What is right in workers: each
    draws numbers of its own; ``set_epoch``, ``enabled`` and ``steps`` hold for all, also persistent ones; a ``generator`` on
    the CPU is seeded for each; it goes to spawned workers as well. A generator on a device does not: workers have none.

    Args:
        mixup_fn: a :class:`Mixup` or :class:`MixupE`.
        collate_fn: samples → batch: (x, labels), or a dict with labels.

    Raises:
        TypeError: for an argument of another type.

    Calling it with a list of samples returns ``(x, target)``, or the dict with the target in place of the labels.
    """

    def __init__(self, mixup_fn: Mixup, collate_fn: Callable[[list], Any] = default_collate):
        if not isinstance(mixup_fn, Mixup):
            raise TypeError(f"mixup_fn must be a Mixup or MixupE, got {type(mixup_fn).__name__}")
        if not callable(collate_fn):
            raise TypeError(f"collate_fn must be callable, got {type(collate_fn).__name__}")
        generator = mixup_fn.plan.generator
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(
                f"mixup_fn must have a generator on the CPU in a collate function, got one on {generator.device}"
            )
        self.mixup_fn, self.collate_fn = mixup_fn, collate_fn

    def __call__(self, samples: list) -> Any:
        return mix_batch(self.mixup_fn, self.collate_fn(samples))


def mix_batch(mixup_fn: Callable, batch: Any) -> Any:
    """A loader's batch mixed: (x, labels) → (x, target); more entries, x being a tuple of all but the last; or a dict."""
    if isinstance(batch, Mapping):
        return mixup_fn(batch)[0]
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise TypeError(f"batch must be (x, labels), or a dict with labels, got {type(batch).__name__}")
    *x, labels = batch
    mixed, target = mixup_fn(x[0] if len(x) == 1 else tuple(x), labels)
    return (mixed, target) if len(x) == 1 else (*mixed, target)
