"""mix and mix_out: pairings, layouts, dtypes, boxes, in place, against the reference in float64."""

import os
import subprocess
import sys

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels import conventions

from ..cases import DTYPES, check, compute_dtype, thorough
from ..conftest import ON_CPU, Served

ops = torch.ops.mixupe
# What another order of one multiplication and one addition may change.
TIGHT = {"factor": 1.5, "ulps": 1}


def images_of(shape, memory_format=torch.contiguous_format):
    return torch.zeros(shape).to(memory_format=memory_format)


IMAGES = [
    torch.zeros(6, 5),
    torch.zeros(6),
    torch.zeros(1, 3, 2),
    torch.zeros(6, 1500),
    torch.zeros(5, 3, 7, 9),
    images_of((5, 3, 7, 9), torch.channels_last),
    torch.zeros(10, 3, 8, 4)[::2],
    torch.zeros(4, 6, 5).transpose(1, 2),
    *thorough(
        images_of((10, 3, 8, 4), torch.channels_last)[1::2],
        images_of((2, 3, 4, 5, 6), torch.channels_last_3d),
        torch.zeros(3, 40000),
    ),
]


def describe(value):
    return f"{tuple(value.shape)}/{value.stride()}" if isinstance(value, torch.Tensor) else None


def like(image, dtype):
    """Random values in the layout of ``image``."""
    x = torch.empty_strided(image.shape, image.stride(), dtype=dtype)
    return x.copy_(torch.randn(image.shape))


def check_mix(x, partner, lam, rows=None, *more, box=None):
    """The operator, and the same into a buffer filled with NaN. ``more``: scale, shift, dtype, memory_format."""
    more = (*more, *[None] * (4 - len(more)))
    result = check("mix", x, partner, lam, rows, *more, box, **TIGHT)
    assert result.actual.stride() == result.peer.stride()
    out = torch.full_like(result.actual, torch.nan)
    assert ops.mix_out(x, partner, lam, rows, *more[:2], box, out=out) is None
    assert torch.equal(out, result.actual)
    return result


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_becomes_every_other(backend, source, dtype):
    x, lam = torch.randn(5, 3, 7).to(source), torch.rand(5, dtype=compute_dtype(source))
    for partner in (torch.randint(5, (5,)), None):
        check_mix(x, partner, lam, None, None, None, dtype)


@pytest.mark.parametrize("pairing", ["partner", "flip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=describe)
def test_mix(backend, image, dtype, pairing):
    x = like(image, dtype)
    batch, compute = x.shape[0], compute_dtype(dtype)
    partner = torch.randint(batch, (batch,)) if pairing == "partner" else None
    per_sample = torch.rand(batch, dtype=compute)
    per_sample[::3], per_sample[1::3] = 0, 1
    for lam in (per_sample, *torch.tensor([0.3, 0, 1], dtype=compute)):
        check_mix(x, partner, lam)
    lam = torch.rand(batch + 3, dtype=compute)
    lam[::2] = 1
    rows = torch.randint(batch, (batch + 3,))
    check_mix(x, None if partner is None else torch.randint(batch, (batch + 3,)), lam, rows)


def test_mix_from_and_into_every_other_sample(backend):
    wide, partner, lam = torch.randn(5, 2, 3, 11), torch.randint(5, (5,)), torch.rand(5)
    for pairing in (partner, None):
        expected = check("mix", wide[:, 1], pairing, lam, **TIGHT).actual
        out = torch.zeros(5, 2, 3, 11)[:, 0]
        ops.mix_out(wide[:, 1], pairing, lam, out=out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("pairing", ["partner", "flip", "in place"])
@pytest.mark.parametrize("distance", [352, 341])
def test_what_lies_between_samples_of_out_stays(backend, distance, pairing):
    """Samples that begin at one place within lines of the cache, which is not their start, or each at another."""
    x, lam, normalise = torch.randn(5, 331), torch.rand(5), (torch.rand(331), torch.randn(331))
    partner = torch.randint(5, (5,)) if pairing == "partner" else None
    expected = ops.mix(x, partner, lam, None, *normalise)
    memory = torch.full((7 + 5 * distance,), torch.nan)
    out = memory[7:].view(5, distance)[:, :331]
    if pairing == "in place":
        x = out.copy_(x)
    ops.mix_out(x, partner, lam, None, *normalise, out=out)
    assert torch.equal(out, expected)
    assert memory.isnan().sum() == memory.numel() - out.numel()


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("source", [torch.uint8, torch.float32, *thorough(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, *thorough(torch.float16)], ids=str)
@pytest.mark.parametrize("input_format", FORMATS, ids=str)
@pytest.mark.parametrize("output_format", [None, *FORMATS], ids=str)
def test_mix_normalises_and_casts(backend, source, target, input_format, output_format):
    x = torch.randint(256, (5, 3, 9, 7), dtype=torch.uint8).contiguous(memory_format=input_format).to(source)
    scale, shift = torch.rand(3) / 100, torch.randn(3)
    partner, lam, rows = torch.randint(5, (8,)), torch.rand(8), torch.randint(5, (8,))
    lam[:2] = torch.tensor([0, 1])
    out = check_mix(x, partner, lam, rows, scale, shift, target, output_format).actual
    assert out.is_contiguous(memory_format=output_format or input_format)
    check_mix(x, None, lam[:5], None, scale, shift, target, output_format)


# Packs of 16 bytes that begin at each of three channels: one tile, two, sizes that are no multiple of a pack; other numbers of channels.
INNERMOST = [
    (5, 3, 8, 6),
    (3, 3, 64, 64),
    (4, 3, 5, 4),
    *thorough((5, 3, 9, 7), (3, 4, 8, 8), (3, 2, 8, 8), (3, 48, 1, 2)),
]


@pytest.mark.parametrize("target", [torch.bfloat16, *thorough(torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("shape", INNERMOST, ids=str)
def test_channels_that_are_innermost(backend, shape, target):
    x = torch.randint(256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    scale, shift = (torch.rand(shape[1]) + 0.5) / 100, 4 * torch.randn(shape[1])
    batch, more = shape[0], (scale, shift, target)
    lam = torch.rand(batch)
    lam[:2] = torch.tensor([0, 1])
    for pairing in (torch.randint(batch, (batch,)), None):
        for weights in (lam, *torch.tensor([0.3, 0, 1])):
            out = check_mix(x, pairing, weights, None, *more).actual
            assert out.is_contiguous(memory_format=torch.channels_last)
        check_mix(x, pairing, lam, None, None, None, target)
    rows = torch.randint(batch, (batch + 2,))
    check_mix(x, rows.flip(0), torch.rand(batch + 2), rows, *more)
    check_mix(x[::2], None, lam[::2].contiguous(), None, *more)


BOXES = {"inside": (2, 5, 1, 4), "all": (0, 9, 0, 7), "empty": (0, 0, 0, 0), "beyond": (-3, 4, 5, 99)}
MORE_BOXES = {"a corner": (7, 9, 5, 7), "lines": (3, 4, 0, 7), "no width": (2, 5, 3, 3), "large": (5, 60, 5, 50)}


def check_cut(images, edges, lams, normalise=(None, None), target=None):
    """Inside the box the partner's values, elsewhere those without a box; also into a buffer filled with NaN."""
    batch, memory_format = images.shape[0], conventions.row_format(images)
    top, bottom, left, right = (max(edge, 0) for edge in edges)
    box, more = torch.tensor(edges), (*normalise, target, memory_format)
    for partner, rows in ((torch.randint(batch, (batch,)), None), (None, None), (None, torch.randperm(batch))):
        for lam in lams:
            lam = lam.to(compute_dtype(images.dtype))
            out = ops.mix(images, partner, lam, rows, *more, box)
            expected = ops.mix(images, partner, lam, rows, *more)
            others = ops.mix(images, partner, 0 * lam, rows, *more)
            expected[..., top:bottom, left:right] = others[..., top:bottom, left:right]
            assert torch.equal(out, expected) and out.stride() == expected.stride()
            given = torch.full_like(out, torch.nan)
            ops.mix_out(images, partner, lam, rows, *normalise, box, out=given)
            assert torch.equal(given, out)


def check_cut_of(shape, dtype, edges, lams, channels_last):
    """``check_cut`` of random values, bytes normalised on the way, in both orders of the channels where they are asked for."""
    x = torch.randint(256, shape).to(dtype)
    normalise = (torch.rand(shape[1]) + 0.5, torch.randn(shape[1])) if dtype == torch.uint8 else (None, None)
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), []) if channels_last else []
    for memory_format in (torch.contiguous_format, *formats):
        images = x.contiguous(memory_format=memory_format)
        check_cut(images, edges, lams, normalise, torch.float32 if dtype == torch.uint8 else None)


@pytest.mark.parametrize("box", [*BOXES.values(), *thorough(*MORE_BOXES.values())], ids=[*BOXES, *MORE_BOXES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, *thorough(*DTYPES[1:])], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 7), (5, 3, 9, 7), *thorough((4, 2, 3, 9, 7), (3, 3, 70, 53))], ids=str)
def test_mix_inside_a_box(backend, shape, dtype, box):
    check_cut_of(shape, dtype, box, (torch.rand(shape[0]), torch.ones(())), channels_last=True)


# Triton finds a line and a column for each pack of 4 to 16 elements: packs end with lines, or have parts in two; tiles are of
# an image or of several, and end within lines. (shape, box)
PACKED = {
    "sides within packs": ((3, 2, 20, 32), (3, 17, 5, 27)),
    "sides between packs": ((3, 2, 20, 32), (0, 9, 16, 32)),
    "one line": ((3, 2, 20, 32), (19, 20, 0, 32)),
    "one column": ((3, 2, 20, 32), (0, 20, 15, 16)),
    "all": ((3, 2, 20, 32), (-1, 20, 0, 33)),
    "nothing": ((3, 2, 20, 32), (4, 9, 7, 7)),
    "across tiles": ((2, 1, 70, 48), (21, 44, 15, 44)),
    "packs in two lines": ((2, 2, 40, 20), (0, 40, 18, 20)),
    "packs in two images": ((2, 16, 7, 7), (0, 1, 0, 6)),
    "odd lines, across tiles": ((2, 1, 91, 47), (85, 91, 0, 46)),
    "several images a channel": ((2, 2, 3, 17, 20), (0, 17, 3, 18)),
    "narrow lines": ((2, 3, 50, 3), (10, 49, 1, 2)),
    "lines of one column": ((2, 2, 150, 1), (10, 149, 0, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("case", PACKED)
def test_the_sides_of_a_box_are_within_packs_lines_and_tiles(backend, case, dtype):
    shape, box = PACKED[case]
    lam = torch.tensor([0.3, 0.0, 1.0])[: shape[0]]
    check_cut_of(shape, dtype, box, (lam,), channels_last="image" in case or shape[-1] == 32)


@pytest.mark.parametrize("source", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 45])
@pytest.mark.parametrize("input_format, output_format", [FORMATS, FORMATS[::-1]], ids=str)
def test_a_box_in_images_that_change_their_layout(backend, input_format, output_format, width, source):
    x = torch.randint(256, (4, 3, 20, width)).to(source).contiguous(memory_format=input_format)
    scale, shift = torch.rand(3), torch.randn(3)
    lam, box = torch.tensor([0.3, 0, 1, 1]), torch.tensor([3, 17, 5, 27])
    check_mix(x, torch.randperm(4), lam, None, scale, shift, torch.float32, output_format, box=box)
    check_mix(x, None, lam, None, scale, shift, torch.float32, output_format, box=box)


@pytest.mark.parametrize("pairing", ["partner", "flip"])
@pytest.mark.parametrize("width", [32, 45])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_what_a_box_leaves_out_is_not_read(backend, width, memory_format, pairing):
    """Sample 0 has NaN where only its pixels inside the box are needed, sample 3 where only those outside are."""
    x, box = torch.randn(4, 2, 20, width), (3, 17, 5, 27)
    inside = torch.zeros(20, width, dtype=torch.bool)
    inside[box[0] : box[1], box[2] : box[3]] = True
    x[0, :, ~inside] = torch.nan
    images = x.contiguous(memory_format=memory_format)
    if pairing == "flip":
        out = ops.mix(images, None, torch.tensor([0.0, 1, 1, 1]), box=torch.tensor(box))
        assert torch.equal(out[0], x[3]) and torch.equal(out[3], torch.where(inside, x[0], x[3]))
        return
    x[3, :, inside] = torch.nan
    images = x.contiguous(memory_format=memory_format)
    partner, lam = torch.tensor([1, 0, 0, 0]), torch.tensor([0.0, 1, 1, 1])
    out = ops.mix(images, partner, lam, box=torch.tensor(box))
    assert torch.equal(out, torch.where(inside, x[partner], torch.stack([x[1], x[1], x[2], x[3]])))


@pytest.mark.parametrize("shape", [(5, 2, 9, 7), (3, 2, 20, 32)], ids=str)
def test_a_flip_inside_a_box_may_be_in_place(backend, shape):
    x, lam, box = torch.randn(shape), torch.rand(shape[0]), torch.tensor([2, 5, 1, 4])
    expected = ops.mix(x, None, lam, box=box)
    ops.mix_out(x, None, lam, None, None, None, box, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(0, 2, 9, 8), (3, 2, 0, 8), (3, 2, 9, 0), (3, 0, 9, 8)], ids=str)
def test_a_box_in_images_of_no_pixels(backend, shape):
    x, lam, box = torch.empty(shape), torch.tensor(0.5), torch.tensor([2, 5, 1, 4])
    for partner in (torch.arange(shape[0]), None):
        assert ops.mix(x, partner, lam, box=box).shape == shape


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_flip_mixes_in_place(backend, batch):
    x, lam = torch.randn(batch, 3, 110), torch.rand(batch)
    lam[::4] = 1
    expected = mk.mix(x, "flip", lam)
    mk.mix(x, "flip", lam, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("length", [50, 64])  # and of whole 16-byte vectors
def test_weight_zero_is_not_read(backend, length):
    x = torch.randn(4, length)
    x[2:] = torch.nan
    partner, lam = torch.tensor([2, 0, 0, 1]), torch.tensor([1.0, 0.5, 0.0, 0.0])
    assert torch.equal(ops.mix(x, partner, lam)[[0, 2, 3]], x[[0, 0, 1]])
    assert torch.equal(ops.mix(x, None, torch.tensor([1.0, 1, 0, 0])), x[[0, 1, 1, 0]])


def test_an_empty_batch_or_choice_of_rows(backend):
    x, none = torch.randn(4, 9), torch.empty(0, dtype=torch.int64)
    half = torch.tensor(0.5)
    assert ops.mix(x[:0], none, half).shape == (0, 9)
    assert ops.mix(x[:0], None, half).shape == (0, 9)
    assert ops.mix(x, none, half.expand(0), none).shape == (0, 9)


HUGE = 2**62


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "edges",
    [
        (-3, 2, 1, 9),
        (-HUGE, HUGE, -HUGE, HUGE),
        (1, HUGE, 2, HUGE),
        (HUGE, HUGE, 0, 3),
        (-5, -2, 0, 6),
        (0, 4, HUGE, HUGE),
        (0, 4, -HUGE, 2),
        (3, 1, 0, 2),
    ],
)
def test_a_box_past_the_image_ends_with_it(backend, edges, memory_format):
    x = torch.randn(4, 3, 4, 6).to(memory_format=memory_format)
    check_mix(x, torch.tensor([1, 2, 3, 0]), torch.tensor(0.3), box=torch.tensor(edges))


@pytest.mark.parametrize("partner", [None, "random"])
@pytest.mark.parametrize("shape", [(2, 3, 65, 64), (3, 2, 97, 101), (3, 3, 104, 128)], ids=str)
def test_channels_longer_than_a_tile(backend, shape, partner):
    """Triton's tiles then have two channels at most: the ends of channels are within tiles and at their ends."""
    x, lam = torch.randint(256, shape, dtype=torch.uint8), torch.rand(shape[0])
    partner = None if partner is None else torch.randperm(shape[0])
    scale, shift = torch.rand(2, shape[1])
    check("mix", x, partner, lam, None, scale, shift, torch.float32)


@pytest.mark.skipif(Served("cpp") not in ON_CPU, reason="C++ is not among the backends of this run")
def test_results_larger_than_the_caches():
    """This file's tests with every result of C++ stored past the caches, as large ones are."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "cpp", "-q", "-p", "no:cacheprovider", "-n", "0"]
    environment = {**os.environ, "MIXUPE_LAST_LEVEL_CACHE": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
