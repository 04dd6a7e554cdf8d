"""timm's prefetcher, which wants its mixing in the collate function and normalises afterwards: uint8 in, uint8 out."""

from typing import Any

from timm.data import FastCollateMixup
from timm.data.loader import fast_collate

from ..batch.collate import Collate
from ..batch.mixup import Mixup


class FastCollate(FastCollateMixup):
    """``FastCollateMixup`` by one of our mixers: ``collate_fn`` of ``timm.data.create_loader`` with its prefetcher.

    Args:
        mixup_fn: of :func:`mixupe_kernels.like_timm`, or a :class:`MixupE` without mean, std and dtype.

    Raises:
        TypeError: if ``mixup_fn`` is no mixer.

    Calling it with a list of (uint8 image, class) returns (uint8 images, MixedTarget). timm's loader takes it for one of its
    own, so that ``loader.mixup_enabled = False`` works.
    """

    def __init__(self, mixup_fn: Mixup):
        self.collate = Collate(mixup_fn, fast_collate)

    @property
    def mixup_enabled(self) -> bool:
        return self.collate.mixup_fn.enabled

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self.collate.mixup_fn.enabled = value

    def __call__(self, batch: list, _: Any = None) -> Any:
        return self.collate(batch)
