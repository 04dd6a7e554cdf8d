"""Cross-entropy, entropy and lse of each row, and cross-entropy alone, for which other libraries have kernels."""

from ..cases import Case
from .contenders import contenders


@contenders(Case("ce_entropy", (128, 10)), Case("ce_entropy", (256, 1000)), Case("ce_entropy", (256, 1000), "bfloat16"))
def test_ce_entropy(benchmark, contender):
    contender.time(benchmark)


@contenders(Case("cross_entropy", (256, 1000)), Case("cross_entropy, soft", (256, 1000)))
def test_cross_entropy(benchmark, contender):
    contender.time(benchmark)
