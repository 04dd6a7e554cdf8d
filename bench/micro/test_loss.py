"""MixupE's loss, forward and backward, of B mixed and B clean rows."""

from ..cases import CROSS_ENTROPY, Bar, Case
from .contenders import contenders

BESIDE = (Bar(CROSS_ENTROPY, 1),)


@contenders(
    Case("mixupe_loss", (64, 10), bars=BESIDE),
    Case("mixupe_loss", (64, 10), "bfloat16", bars=BESIDE),
    Case("mixupe_loss", (128, 100), bars=BESIDE),
    Case("mixupe_loss", (128, 1000), bars=BESIDE),
    Case("mixupe_loss", (128, 1000), "bfloat16", bars=BESIDE),
)
def test_loss(benchmark, contender):
    contender.time(benchmark)
