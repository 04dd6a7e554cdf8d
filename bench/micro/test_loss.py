"""MixupE's loss, forward and backward, of B mixed and B clean rows."""

from ..cases import Case
from .contenders import contenders


@contenders(
    Case("mixupe_loss", (64, 10)),
    Case("mixupe_loss", (64, 10), "bfloat16"),
    Case("mixupe_loss", (128, 100)),
    Case("mixupe_loss", (128, 1000)),
    Case("mixupe_loss", (128, 1000), "bfloat16"),
)
def test_loss(benchmark, contender):
    contender.time(benchmark)
