"""From the loader's uint8 images to the model's batch: normalised and mixed in one pass."""

from ..cases import Case
from .contenders import contenders


@contenders(
    Case("uint8 normalise mix", (32, 3, 96, 96)),
    Case("uint8 normalise mix", (32, 3, 96, 96), "bfloat16"),
)
def test_uint8(benchmark, contender):
    contender.time(benchmark)
