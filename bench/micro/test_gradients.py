"""The one backward of every loss, from what the forward saved."""

from ..cases import Case
from .contenders import contenders


@contenders(
    Case("ce_entropy backward", (128, 10)),
    Case("ce_entropy backward", (256, 1000)),
    Case("ce_entropy backward", (256, 1000), "bfloat16"),
)
def test_ce_entropy_backward(benchmark, contender):
    contender.time(benchmark)
