"""What is measured, as data: the cases with the bars each has to clear, and the rows that a run writes."""

from dataclasses import dataclass
from typing import NamedTuple

# Contenders that are not backends of ours.
EAGER, COMPILE, COPY, FLOAT32 = "eager", "torch.compile", "copy_", "float32 logits"
# For another result: plain cross-entropy of the same rows, which a loss costs at least.
CROSS_ENTROPY, LINEAR_CROSS_ENTROPY = "F.cross_entropy", "F.linear_cross_entropy"

# Bars that are not a speedup over a contender: a share of a measured ceiling, or a most.
COPY_RATE, READ_RATE, ENQUEUE, LAUNCHES = "copy rate", "read rate", "host enqueue, µs", "launches"
AT_MOST = (ENQUEUE, LAUNCHES)


class Bar(NamedTuple):
    """``against`` a contender: time it takes over time we take, at least ``value``; else one of the bars above."""

    against: str
    value: float


@dataclass(frozen=True)
class Case:
    """One comparison: everything in it runs on the same data.

    Attributes:
        family: which workload builds it, a key of ``bench.workloads.WORKLOADS``.
        shape: of x for mixing, (B, ...); (B, C) for the whole loss, which has 2B rows; (N, D, C) for the linear loss;
            (B, D, C) for a step; (N, C) for the rest.
        dtype: of what is written (mixing) or of the logits; mixing "uint8" images reads uint8.
        dry_shape: what a dry run has instead, small enough for Triton's interpreter.
        bars: what it has to clear.
        quick: part of ``--quick``.
        rounds: of turns, in a run that is not quick: fewer where a call takes a second.
    """

    family: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    dry_shape: tuple[int, ...] = ()
    bars: tuple[Bar, ...] = ()
    quick: bool = True
    rounds: int = 61

    @property
    def label(self) -> str:
        """How tables and pictures call it."""
        shape = "×".join(map(str, self.shape))
        return f"{self.family} {shape} {self.dtype}"


@dataclass
class Row:
    """One contender in one case; seconds are medians with quartiles. None where a figure was not taken.

    ``seconds`` is wall time of a call on a CPU; on a GPU the time between replays of a CUDA graph over rotating
    buffers, ``stream_seconds`` the same calls issued one by one, ``enqueue_seconds`` what the host needs to issue one.
    ``speedup`` is its time over ours, ``bytes_moved`` the floor (DESIGN §5), ``error`` the largest deviation from the
    float64 reference over the largest value.
    """

    case: str
    provider: str
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    stream_seconds: float | None = None
    enqueue_seconds: float | None = None
    bytes_moved: int | None = None
    bytes_per_second: float | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""


@dataclass
class Verdict:
    """One bar of one case: what was asked, what was measured; ``met`` is None where it could not be measured."""

    case: str
    against: str
    bar: float
    measured: float | None = None
    met: bool | None = None


IMAGES = (256, 3, 224, 224)


def _loss(shape: tuple[int, int], eager: float, compiled: float, **options) -> Case:
    return Case("mixupe_loss", shape, bars=(Bar(EAGER, eager), Bar(COMPILE, compiled)), **options)


CPU_CASES = (
    *(
        Case("mixupe_loss", (batch, 10), dtype, bars=(Bar(CROSS_ENTROPY, 1 / 1.1),), quick=batch == 64)
        for batch in (16, 64, 2048)
        for dtype in ("float32", "bfloat16")
    ),
    _loss((128, 100), 3, 1.2),
    Case("mixupe_loss", (128, 1000), bars=(Bar(CROSS_ENTROPY, 1 / 0.6),)),
    _loss((256, 1000), 5, 2.5),
    _loss((1024, 1000), 5, 2.5, quick=False),
    _loss((4096, 1000), 5, 2.5, quick=False),
    _loss((256, 21841), 4.5, 2, quick=False),
    Case("mixupe_loss", (256, 1000), "bfloat16", bars=(Bar(FLOAT32, 1),)),
    Case("mixupe_loss", (4096, 1000), "bfloat16", bars=(Bar(FLOAT32, 1),), quick=False),
    *(
        Case("linear loss", shape, bars=(Bar(LINEAR_CROSS_ENTROPY, 1 / 1.05),), quick=False, rounds=21)
        for shape in ((512, 768, 21841), (1024, 768, 21841), (512, 512, 8192), (512, 768, 50257))
    ),
    Case("compiled step", (100, 64, 10), bars=(Bar(COMPILE, 1 / 1.02),)),
    Case("compiled step", (100, 64, 100), bars=(Bar(COMPILE, 1),), quick=False),
    Case("compiled step", (256, 64, 1000), bars=(Bar(COMPILE, 1),), quick=False),
    Case("mix", (100, 64), bars=(Bar(EAGER, 1.5),)),
    Case("mix", IMAGES, bars=(Bar(EAGER, 3.5), Bar(COMPILE, 1))),
    Case("mix out=", IMAGES, bars=(Bar(COPY, 1 / 1.05),)),
    Case("mixed and clean out=", IMAGES, bars=(Bar(COPY, 1),)),
    Case("uint8 normalise mix", IMAGES, bars=(Bar(EAGER, 5), Bar(COMPILE, 1.2))),
)

MANY_IMAGES = (1024, 3, 224, 224)
_DRY_IMAGES = (4, 3, 8, 8)


def _gpu_loss(shape: tuple[int, int], dtype: str, dry_shape: tuple[int, int], compiled: float, *more: Bar, **options):
    return Case("mixupe_loss", shape, dtype, dry_shape, (Bar(EAGER, 5), Bar(COMPILE, compiled), *more), **options)


# What a short run must not miss comes first.
GPU_CASES = (
    _gpu_loss((256, 1000), "float32", (3, 100), 1, Bar(ENQUEUE, 60), Bar(LAUNCHES, 5)),
    _gpu_loss((1024, 21841), "bfloat16", (2, 4099), 1.3),
    Case("ce_entropy", (4096, 128256), "bfloat16", (2, 9001), (Bar(READ_RATE, 0.9),)),
    Case("ce_entropy backward", (4096, 128256), "bfloat16", (2, 9001), (Bar(COPY_RATE, 0.9),)),
    Case("mix", IMAGES, "bfloat16", _DRY_IMAGES, (Bar(COPY_RATE, 0.9),)),
    Case("uint8 normalise mix", IMAGES, "bfloat16", _DRY_IMAGES, (Bar(COPY_RATE, 0.85),)),
    _gpu_loss((4096, 1000), "bfloat16", (4, 1000), 1, quick=False),
    Case("ce_entropy", (4096, 21841), "bfloat16", (3, 4099), (Bar(READ_RATE, 0.9),), quick=False),
    Case("ce_entropy backward", (4096, 21841), "bfloat16", (3, 4099), (Bar(COPY_RATE, 0.9),), quick=False),
    Case("mix flip", IMAGES, "bfloat16", _DRY_IMAGES, (Bar(COPY_RATE, 0.9),), quick=False),
    Case("cross_entropy", (4096, 1000), "float32", (4, 1000), quick=False),
    _gpu_loss((256, 1000), "bfloat16", (3, 100), 1, quick=False),
    _gpu_loss((1024, 21841), "float32", (2, 4099), 1.3, quick=False),
    _gpu_loss((4096, 128256), "bfloat16", (1, 9001), 1.3, quick=False),
    Case("mix", IMAGES, "float32", _DRY_IMAGES, (Bar(COPY_RATE, 0.9),), quick=False),
    Case("mix", MANY_IMAGES, "bfloat16", _DRY_IMAGES, (Bar(COPY_RATE, 0.9),), quick=False),
    Case("mix", MANY_IMAGES, "float32", _DRY_IMAGES, (Bar(COPY_RATE, 0.9),), quick=False),
    Case("mixed and clean out=", IMAGES, "bfloat16", _DRY_IMAGES, quick=False),
    Case("cross_entropy", (4096, 128256), "bfloat16", (1, 9001), quick=False),
    Case("cross_entropy, soft", (4096, 1000), "float32", (4, 1000), quick=False),
)
