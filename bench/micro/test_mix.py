"""Mixing a batch: rows of a table, and images."""

from ..cases import Case
from .contenders import contenders


@contenders(Case("mix", (100, 64)), Case("mix", (64, 3, 64, 64)), Case("mix", (64, 3, 64, 64), "bfloat16"))
def test_mix(benchmark, contender):
    contender.time(benchmark)


@contenders(Case("mix out=", (64, 3, 64, 64)), Case("mixed and clean out=", (64, 3, 64, 64)))
def test_mix_into_a_buffer(benchmark, contender):
    contender.time(benchmark)
