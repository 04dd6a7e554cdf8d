"""Every CPU backend against the reference in float64, forward and backward; gradcheck, opcheck, edges, bad input."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels import conventions
from mixupe_kernels.ops import reference

from .cases import DTYPES, SHAPES, TARGETS, assert_accurate, compute_dtype, make_logits, make_target, to_double

ops = torch.ops.mixupe
LAYOUTS = ["contiguous", "sliced", "strided", "transposed"]
# (label_smoothing, with class weights)
OPTIONS = [(0.0, False), (0.1, False), (0.0, True), (0.1, True)]


def with_options(target, classes, dtype, smoothing=0.0, weighted=False):
    weight = torch.rand(classes, dtype=compute_dtype(dtype)) + 0.5 if weighted else None
    return (*target, weight, smoothing)


def check_ce_entropy(logits, target, sigmoid=False):
    """Forward and backward with random upstream gradients, against float64 and against PyTorch in the same dtype."""
    options = (conventions.IGNORE_INDEX, sigmoid)
    truth = reference.ce_entropy(logits.double(), *to_double(target), *options)
    peer = reference.ce_entropy(logits, *target, *options)
    outputs = ops.ce_entropy(logits, *target, *options)
    for output, expected, torchs in zip(outputs, truth, peer, strict=True):
        assert_accurate(output, expected, torchs)
    upstream = torch.randn(3, logits.shape[0], dtype=outputs[0].dtype)
    for chosen in ((0, 1, 2), (0,), (1,)):
        gradients = [upstream[i] if i in chosen else None for i in range(3)]
        doubled = to_double(gradients)
        truth_dz = reference.ce_entropy_backward(*doubled, logits.double(), *truth[1:], *to_double(target), *options)
        peer_dz = reference.ce_entropy_backward(*gradients, logits, *peer[1:], *target, *options)
        dz = ops.ce_entropy_backward(*gradients, logits, *outputs[1:], *target, *options)
        assert dz.is_contiguous()
        assert_accurate(dz, truth_dz, peer_dz)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ce_entropy(backend, shape, kind, dtype):
    check_ce_entropy(make_logits(shape, dtype), with_options(make_target(kind, shape, dtype), shape[1], dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("smoothing, weighted", OPTIONS)
def test_ce_entropy_options_and_layouts(backend, kind, smoothing, weighted, layout):
    shape, dtype = (9, 37), torch.float32
    target = with_options(make_target(kind, shape, dtype), shape[1], dtype, smoothing, weighted)
    check_ce_entropy(make_logits(shape, dtype, layout), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bce_entropy(backend, shape, dtype):
    target = with_options(make_target("dense", shape, dtype), shape[1], dtype)
    check_ce_entropy(make_logits(shape, dtype), target, sigmoid=True)


@pytest.mark.parametrize("kind", ["index", "mixed"])
def test_ignored_labels_add_nothing(backend, kind):
    shape = (8, 11)
    labels, partner, lam = make_target(kind, shape, torch.float32)
    labels[[0, 3, 4]] = -100
    if partner is not None:
        partner[[3, 5]] = -100
    logits = make_logits(shape, torch.float32)
    check_ce_entropy(logits, (labels, partner, lam, None, 0.1))
    ce, entropy, lse = ops.ce_entropy(logits, labels, partner, lam)
    assert ce[3] == 0
    dz = ops.ce_entropy_backward(torch.ones(8), None, None, logits, entropy, lse, labels, partner, lam)
    assert torch.equal(dz[3], torch.zeros(11))


def extreme_logits(name):
    z = torch.randn(6, 9)
    cases = {
        "shifted up": z + 1e4,
        "shifted down": z - 1e4,
        "large": z * 1e4,
        "constant": torch.full_like(z, 7.0),
        "one-hot": z.index_fill(1, torch.tensor([2]), 60.0),
        "masked": z.index_fill(1, torch.tensor([1, 5]), -torch.inf),
        "masked but one": torch.full_like(z, -torch.inf).index_fill(1, torch.tensor([4]), 3.0),
        "all masked": torch.full_like(z, -torch.inf),
        "infinite": z.index_fill(1, torch.tensor([3]), torch.inf),
        "nan": z.index_fill(1, torch.tensor([0]), torch.nan),
    }
    return cases[name]


EXTREMES = ["shifted up", "shifted down", "large", "constant", "one-hot", "masked", "masked but one", "all masked"]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", [*EXTREMES, "infinite", "nan"])
def test_extreme_logits(backend, name, kind):
    logits = extreme_logits(name)
    target = make_target(kind, logits.shape, torch.float32)
    if kind == "dense":
        target[0][logits.isinf()] = 0  # a masked class has no share in a dense target
    outputs = ops.ce_entropy(logits, *target)
    truth = reference.ce_entropy(logits.double(), *to_double(target))
    for output, expected, peer in zip(outputs, truth, reference.ce_entropy(logits, *target), strict=True):
        assert_accurate(output, expected, peer)
    if name in ("all masked", "infinite", "nan"):
        assert outputs[1].isnan().all()
        assert outputs[0].isnan().all() or (kind == "dense" and name == "all masked")  # no target mass there
    if name.startswith("shifted"):
        # fp32 rounding of CE and H themselves, not of the shift.
        q = (outputs[1] - outputs[0]).double()
        scale = torch.maximum(truth[0].abs(), truth[1])
        assert ((q - (truth[1] - truth[0])).abs() <= 8 * torch.finfo(torch.float32).eps * scale.clamp(min=1)).all()


@pytest.mark.parametrize("name", EXTREMES[:-1])
def test_gradients_of_extreme_logits(backend, name):
    logits = extreme_logits(name)
    labels, upstream = torch.full((6,), 4), torch.randn(3, 6)
    _, entropy, lse = ops.ce_entropy(logits, labels)
    dz = ops.ce_entropy_backward(*upstream, logits, entropy, lse, labels)
    truth = reference.ce_entropy(logits.double(), labels)
    expected = reference.ce_entropy_backward(*upstream.double(), logits.double(), *truth[1:], labels)
    # p = e^(z - lse) inherits the rounding of lse in float32: half an ulp of |lse|, 5e-4 at 1e4.
    bound = 1e-5 + 2 * torch.finfo(torch.float32).eps * truth[2].abs().max()
    assert ((dz - expected).abs() <= bound * (1 + expected.abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_near_certainty_is_rounded_once(backend, dtype):
    # p → 1 at the label: p - y must be formed before rounding, or bfloat16 loses all of it.
    logits = torch.zeros(4, 5, dtype=dtype)
    logits[:, 2] = 8.0
    labels = torch.full((4,), 2)
    _, entropy, lse = ops.ce_entropy(logits, labels)
    dz = ops.ce_entropy_backward(torch.ones(4), None, None, logits, entropy, lse, labels)
    expected = (logits.double().softmax(1)[:, 2] - 1).to(dtype)
    assert (expected != 0).all()
    torch.testing.assert_close(dz[:, 2], expected)


# Every remainder of the vector widths and of the steps of a row, and rows past a block.
LENGTHS = [*range(1, 71), *range(126, 131), 159, 160, 161, 255, 257, 2047, 2049]


@pytest.mark.parametrize("classes", LENGTHS)
def test_bfloat16_gradients_of_any_length_and_label(backend, classes):
    labels = torch.arange(classes)[-128:]
    rows = len(labels)
    logits = make_logits((rows, classes), torch.bfloat16)
    target = (labels, labels.flip(0), torch.rand(rows))
    upstream = torch.randn(3, rows)
    _, entropy, lse = ops.ce_entropy(logits, *target)
    dz = ops.ce_entropy_backward(*upstream, logits, entropy, lse, *target)
    truth = reference.ce_entropy(logits.double(), *to_double(target))
    expected = reference.ce_entropy_backward(*upstream.double(), logits.double(), *truth[1:], *to_double(target))
    # Half an ulp, and what rounding in float32 may add to it.
    bound = 0.51 * torch.finfo(torch.bfloat16).eps * expected.abs() + 1e-6 * upstream.abs().amax(0)[:, None]
    assert ((dz.double() - expected).abs() <= bound).all()


# CUDA's NaN has all its bits set; to round it as integers could carry it over into -0.
NAN_OF_ALL_BITS = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)


def gradient_of_fixed_logits():
    """A digest of bfloat16 gradients, of a backward and made with a loss, from exact inputs; one row of each is NaN."""
    logits = ((torch.arange(64 * 1000) * 7919 % 1001 - 500) / 64).view(64, 1000).bfloat16()
    labels, lam = torch.arange(64) * 15, torch.arange(64) / 64
    _, entropy, lse = ops.ce_entropy(logits, labels, labels.flip(0), lam)
    grad_ce = lam.clone()
    grad_ce[5] = NAN_OF_ALL_BITS
    dz = ops.ce_entropy_backward(grad_ce, -lam, None, logits, entropy, lse, labels, labels.flip(0), lam)
    assert dz[5].isnan().all() and dz.isnan().sum() == 1000
    scalars = (NAN_OF_ALL_BITS[0], torch.tensor(0.3), 63, 1, 0, 0.5, False)
    _, _, whole = ops.mixupe_loss_with_gradient(logits, labels, labels.flip(0), lam, *scalars)
    assert whole[63].isnan().all() and whole.isnan().sum() == 1000
    rescaled = (*scalars[:-1], True)
    assert ops.mixupe_loss_with_gradient(logits, labels, labels.flip(0), lam, *rescaled)[2].isnan().all()
    gradients = torch.cat([dz, whole]).nan_to_num()
    return hashlib.sha256(gradients.view(torch.int16).numpy().tobytes()).hexdigest()


@pytest.mark.skipif("cpp" not in mk.available_backends(), reason="the compiled backend is not built")
def test_every_way_of_rounding_to_bfloat16_is_the_same():
    # By an instruction, where the machine has it, and as integers, which torch's switch for its own kernels brings back.
    with mk.use_backend("cpp"):
        expected = gradient_of_fixed_logits()
    code = "import mixupe_kernels; from tests.test_ops import gradient_of_fixed_logits as g; print(g())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_of_any_bits_stays_one(backend, dtype):
    nan, logits, labels = NAN_OF_ALL_BITS, make_logits((1, 70), dtype), torch.tensor([3])
    _, entropy, lse = ops.ce_entropy(logits, labels)
    for gradients in ((nan, None, None), (None, nan, None), (None, None, nan)):
        assert ops.ce_entropy_backward(*gradients, logits, entropy, lse, labels).isnan().all()
    logits[0, 7] = nan
    for output in ops.ce_entropy(logits, labels):
        assert output.isnan().all()


# mixupe_loss

LOSS_CASES = [
    ("halves", 10, 10),
    ("split", 15, 5),
    ("mixed", 20, 20),
    ("none", 20, 0),
]


@pytest.mark.parametrize("penalty", range(3), ids=conventions.PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*TARGETS, "sigmoid"])
@pytest.mark.parametrize("counts", LOSS_CASES, ids=lambda case: case[0])
def test_mixupe_loss(backend, counts, kind, dtype, penalty):
    check_mixupe_loss(make_logits((20, 37), dtype), kind, counts[1:], penalty)


def check_mixupe_loss(logits, kind, counts, penalty, smoothing=0.0, rescale=True, ignored=()):
    dtype, sigmoid = logits.dtype, kind == "sigmoid"
    target = make_target("dense" if sigmoid else kind, logits.shape, dtype)
    if ignored:
        target[0][list(ignored)] = -100
    scalars = [torch.tensor(value, dtype=compute_dtype(dtype)) for value in (0.7, 0.3)]
    options = (*counts, penalty, 0.5)
    tail = (smoothing, sigmoid)
    doubled = (logits.double(), *to_double(target), *to_double(scalars))
    truth = reference.mixupe_loss(*doubled, *options, rescale, *tail)
    peer = reference.mixupe_loss(logits, *target, *scalars, *options, rescale, *tail)
    outputs = ops.mixupe_loss(logits, *target, *scalars, *options, rescale, *tail)
    for output, expected, torchs in zip(outputs, truth, peer, strict=True):
        assert_accurate(output, expected, torchs, ulps=16)
    grad = torch.tensor(1.7, dtype=scalars[0].dtype)
    tail = (counts[0], penalty, *tail)
    truth_dz = reference.mixupe_loss_backward(grad.double(), *doubled[:-2], *truth[1:], *tail)
    peer_dz = reference.mixupe_loss_backward(grad, logits, *target, *peer[1:], *tail)
    arguments = (grad, logits, *target, *outputs[1:], *tail)
    dz = ops.mixupe_loss_backward(*arguments)
    assert_accurate(dz, truth_dz, peer_dz, ulps=16)
    out = torch.full_like(dz, torch.nan)
    ops.mixupe_loss_backward_out(*arguments, out=out)
    assert torch.equal(out, dz)
    in_place = logits.clone()
    ops.mixupe_loss_backward_out(grad, in_place, *arguments[2:], out=in_place)
    assert torch.equal(in_place, dz)
    loss, parts, gradient = ops.mixupe_loss_with_gradient(logits, *target, *scalars, *options, rescale, *tail[2:])
    one = torch.ones_like(grad)
    assert torch.equal(loss, outputs[0]) and torch.equal(parts, outputs[1])
    truth_dz = reference.mixupe_loss_backward(one.double(), *doubled[:-2], *truth[1:], *tail)
    peer_dz = reference.mixupe_loss_backward(one, logits, *target, *peer[1:], *tail)
    assert_accurate(gradient, truth_dz, peer_dz, ulps=16)


# About the lengths and sizes from which the compiled operator takes a second exponential instead of keeping the first.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2048), (3, 2049), (1038, 1009), (1040, 1009), (2079, 1009)], ids=str)
def test_mixupe_loss_of_many_logits(backend, shape, dtype):
    check_mixupe_loss(make_logits(shape, dtype), "mixed", (shape[0] // 2, shape[0] - shape[0] // 2), 0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 21841), (300, 3)], ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("smoothing, rescale", [(0.0, False), (0.1, True)])
def test_mixupe_loss_shapes_and_options(backend, shape, kind, smoothing, rescale):
    counts = (shape[0] - shape[0] // 2, shape[0] // 2)
    check_mixupe_loss(make_logits(shape, torch.float32), kind, counts, 0, smoothing, rescale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixupe_loss_layouts(backend, layout):
    check_mixupe_loss(make_logits((20, 37), torch.float32, layout), "mixed", (10, 10), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_entropy_keeps_its_slope(backend, dtype):
    """H = 0 has a sign in what the backward keeps: here R = |0 - 2000|, whose gradient is that of the cross-entropy."""
    logits, label = torch.tensor([[2000.0, 0, 0]], dtype=dtype), torch.tensor([1])
    weights = [torch.tensor(value, dtype=compute_dtype(dtype)) for value in (0.5, 0.25, 1.0)]
    _, *saved = ops.mixupe_loss(logits, label, None, None, *weights[:2], 0, 1, 0, 1.0, False)
    gradient = ops.mixupe_loss_backward(weights[2], logits, label, None, None, *saved, 0)
    assert gradient.tolist() == [[0.125, -0.125, 0]]


def test_ignored_rows_leave_both_means(backend):
    check_mixupe_loss(make_logits((20, 37), torch.float32), "index", (10, 10), 0, ignored=(0, 4, 15))
    logits = torch.randn(4, 5, requires_grad=True)
    ignored = torch.full((4,), -100)
    loss = mk.mixupe_loss(logits, mk.MixedTarget(ignored, ignored, torch.ones(4), 2, 2, 0.3), eta=1.0)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(4, 5))


def test_empty_batch(backend):
    logits = torch.zeros(0, 5, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = mk.mixupe_loss(logits, mk.MixedTarget(labels, labels, torch.zeros(0), 0, 0, 0.3), eta=1.0)
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 5)
    assert mk.mix(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 0.5).shape == (0, 3)


def test_leading_dimensions_are_rows(backend):
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.randint(5, (2, 3, 4))
    outputs = mk.ce_entropy(logits, labels)
    flat = mk.ce_entropy(logits.reshape(-1, 5), labels.reshape(-1))
    assert outputs.ce.shape == (2, 3, 4)
    for output, expected in zip(outputs, flat, strict=True):
        assert torch.equal(output.reshape(-1), expected)
    target = mk.MixedTarget(labels, labels.flip(0), torch.tensor([0.3, 1.0]), 1, 1, 0.25)
    rows = mk.MixedTarget(*(t.reshape(-1) for t in target[:2]), target.lam.repeat_interleave(12), 12, 12, 0.25)
    assert mk.mixupe_loss(logits, target, eta=0.5) == mk.mixupe_loss(logits.reshape(-1, 5), rows, eta=0.5)


def test_results_do_not_depend_on_threads_or_runs(backend):
    logits = torch.randn(301, 517, requires_grad=True)
    labels = torch.randint(517, (301,))
    target = mk.MixedTarget(labels, labels.flip(0), torch.rand(301), 200, 101, 0.3)

    def run():
        loss = mk.mixupe_loss(logits, target, eta=0.5)
        return loss, *torch.autograd.grad(loss, logits)

    first = run()
    try:
        torch.set_num_threads(1)
        single = run()
    finally:
        torch.set_num_threads(2)
    again = run()
    assert torch.equal(first[1], again[1]) and first[0] == again[0]
    if backend != "reference":  # eager reductions split by thread
        assert torch.equal(first[1], single[1]) and first[0] == single[0]


# mix

IMAGES = [
    torch.zeros(6, 5),
    torch.zeros(6),
    torch.zeros(1, 3, 2),
    torch.zeros(5, 3, 7, 9),
    torch.zeros(5, 3, 7, 9).to(memory_format=torch.channels_last),
    torch.zeros(10, 3, 8, 4)[::2],
    torch.zeros(10, 3, 8, 4).to(memory_format=torch.channels_last)[1::2],
    torch.zeros(4, 6, 5).transpose(1, 2),
    torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    torch.zeros(3, 40000),
]
IMAGE_IDS = [f"{tuple(x.shape)}/{x.stride()}" for x in IMAGES]


def like(image, dtype):
    """Random values in the layout of ``image``."""
    x = torch.empty_strided(image.shape, image.stride(), dtype=dtype)
    return x.copy_(torch.randn(image.shape))


@pytest.mark.parametrize("pairing", ["partner", "flip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=IMAGE_IDS)
def test_mix(backend, image, dtype, pairing):
    x = like(image, dtype)
    batch = x.shape[0]
    partner = torch.randint(batch, (batch,)) if pairing == "partner" else None
    rows = torch.randint(batch, (batch + 3,))
    for lam in (torch.rand(()), torch.rand(batch), torch.zeros(()), torch.ones(())):
        check_mix(x, partner, lam.to(compute_dtype(dtype)))
    lam = torch.rand(batch + 3).to(compute_dtype(dtype))
    lam[::2] = 1
    check_mix(x, None if partner is None else torch.randint(batch, (batch + 3,)), lam, rows)


def check_mix(x, partner, lam, *more):
    truth = reference.mix(x.double(), partner, *to_double((lam, *more)))
    peer = reference.mix(x, partner, lam, *more)
    actual = ops.mix(x, partner, lam, *more)
    assert actual.stride() == peer.stride()
    assert_accurate(actual, truth, peer, factor=1.5, ulps=1)
    out = torch.full_like(actual, torch.nan)
    ops.mix_out(x, partner, lam, *more, out=out)
    assert torch.equal(out, actual)


@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("output_format", [None, torch.contiguous_format, torch.channels_last], ids=str)
def test_mix_normalises_and_casts(backend, source, target, input_format, output_format):
    x = torch.randint(256, (5, 3, 9, 7), dtype=torch.uint8).contiguous(memory_format=input_format).to(source)
    scale, shift = torch.rand(3) / 100, torch.randn(3)
    partner, lam, rows = torch.randint(5, (8,)), torch.rand(8), torch.randint(5, (8,))
    arguments = (x, partner, lam, rows, scale, shift)
    truth = reference.mix(x.double(), partner, *to_double((lam, rows, scale, shift)))
    peer = reference.mix(*arguments, target, output_format)
    actual = ops.mix(*arguments, target, output_format)
    assert actual.stride() == peer.stride()
    assert_accurate(actual, truth, peer, factor=1.5, ulps=1)
    out = torch.full_like(actual, torch.nan)
    ops.mix_out(*arguments, out=out)
    assert torch.equal(out, actual)


BOXES = {"inside": (2, 5, 1, 4), "all": (0, 9, 0, 7), "a corner": (7, 9, 5, 7), "lines": (3, 4, 0, 7), "empty": (0, 0, 0, 0),
         "no width": (2, 5, 3, 3), "beyond": (-3, 4, 5, 99), "large": (5, 60, 5, 50)}  # fmt: skip


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 7), (5, 3, 9, 7), (4, 2, 3, 9, 7), (3, 3, 70, 53)], ids=str)
def test_mix_inside_a_box(backend, shape, dtype, box):
    x = torch.randint(256, shape).to(dtype)
    edges, batch = torch.tensor(box), shape[0]
    normalise = (torch.rand(shape[1]) + 0.5, torch.randn(shape[1])) if dtype == torch.uint8 else (None, None)
    target = torch.float32 if dtype == torch.uint8 else None
    top, bottom, left, right = (max(edge, 0) for edge in box)
    formats = {3: [None], 4: [None, torch.channels_last], 5: [None, torch.channels_last_3d]}[len(shape)]
    for memory_format in formats:
        images = x if memory_format is None else x.contiguous(memory_format=memory_format)
        for partner, rows in ((torch.randint(batch, (batch,)), None), (None, None), (None, torch.randperm(batch))):
            for lam in (torch.rand(batch), torch.ones(())):
                arguments = (partner, lam.to(compute_dtype(dtype)), rows, *normalise)
                out = ops.mix(images, *arguments, target, memory_format, edges)
                expected = ops.mix(images, *arguments, target, memory_format)
                others = ops.mix(images, partner, 0 * arguments[1], rows, *normalise, target, memory_format)
                expected[..., top:bottom, left:right] = others[..., top:bottom, left:right]
                assert torch.equal(out, expected) and out.stride() == expected.stride()
                given = torch.full_like(out, torch.nan)
                ops.mix_out(images, *arguments, edges, out=given)
                assert torch.equal(given, out)


def test_a_flip_inside_a_box_may_be_in_place(backend):
    x, lam, box = torch.randn(5, 2, 9, 7), torch.rand(5), torch.tensor([2, 5, 1, 4])
    expected = ops.mix(x, None, lam, box=box)
    ops.mix_out(x, None, lam, None, None, None, box, out=x)
    assert torch.equal(x, expected)


def test_box_must_be_four_edges_of_images(backend):
    x, partner, lam = torch.randn(4, 6, 6), torch.arange(4), torch.rand(4)
    for images, box, message in (
        (x, torch.tensor([0, 1, 2]), r"box must have shape \(4,\)"),
        (x, torch.rand(4), "box must have dtype int64"),
        (x[0, :4], torch.tensor([0, 1, 0, 1]), "box needs x of"),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            ops.mix(images, partner, lam, box=box)


def test_weight_zero_is_not_read(backend):
    x = torch.tensor([[1.0, 2.0], [torch.inf, torch.nan]])
    swap = torch.tensor([1, 0])
    assert torch.equal(mk.mix(x, swap, torch.tensor([1.0, 0.0])), torch.tensor([[1.0, 2.0], [1.0, 2.0]]))


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_flip_mixes_in_place(backend, batch):
    x = torch.randn(batch, 3, 11)
    lam = torch.rand(batch)
    expected = mk.mix(x, "flip", lam)
    mk.mix(x, "flip", lam, out=x)
    assert torch.equal(x, expected)


def test_mixing_into_its_own_input_needs_flip():
    if "cpp" not in mk.available_backends():
        pytest.skip("the reference computes before it writes")
    x = torch.randn(4, 3)
    with pytest.raises((ValueError, RuntimeError), match="out"):
        mk.mix(x, torch.tensor([1, 2, 3, 0]), 0.5, out=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_mixed_target(backend, flip, per_sample, dtype):
    labels, pairs = torch.randint(100, (9,)), None if flip else torch.randint(9, (9,))
    lam = torch.rand(9 if per_sample else (), dtype=dtype)
    some = torch.randint(9, (300,))
    for rows, num_mixed in (
        (torch.randperm(9), 5),
        (torch.arange(9).repeat(2), 9),
        (some, 0),
        (some, 300),
        (some[:0], 0),
    ):
        found = ops.mixed_target(labels, pairs, lam, rows, num_mixed)
        expected = []
        for position, own in enumerate(rows.tolist()):
            partner = 8 - own if flip else int(pairs[own])
            weight = float(lam[own] if per_sample else lam)
            partner, weight = (partner, weight) if position < num_mixed else (own, 1.0)
            expected.append((weight, partner, int(labels[own]), int(labels[partner])))
        assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
        assert [part.dtype for part in found] == [dtype] + [torch.int64] * 3


def test_mixed_target_gives_lam_its_gradient(backend):
    labels, rows = torch.arange(4), torch.tensor([2, 0, 2, 1, 3])
    for size in ((), (4,)):
        lam = torch.rand(size, dtype=torch.float64, requires_grad=True)

        def function(lam):
            return ops.mixed_target(labels, None, lam, rows, 3)[0]

        assert torch.autograd.gradcheck(function, lam) and torch.autograd.gradgradcheck(function, lam)


@pytest.mark.parametrize("rows, partner", [([0, 4], [0, 1, 2, 3]), ([0, -1], [0, 1, 2, 3]), ([0, 1], [0, 1, 2, -1])])
def test_mixed_target_refuses_rows_out_of_range(backend, rows, partner):
    arguments = (torch.arange(4), torch.tensor(partner), torch.tensor(0.5), torch.tensor(rows), 1)
    with pytest.raises((ValueError, RuntimeError), match=r"(rows|partner) must be in \[0, 3\], got (4|-1)"):
        ops.mixed_target(*arguments)


def many_to_one(rows, terms):
    """index, weight and offsets with empty, single and long segments."""
    index = torch.randint(rows, (terms,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(terms + 1, (rows,)).sort().values])
    offsets[-1] = terms
    return index, torch.randn(terms), offsets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(), (1,), (3, 5), (1031,)], ids=str)
def test_gather_sum_and_row_dot(backend, size, dtype):
    src = torch.randn(7, *size).to(dtype)
    index, weight, offsets = many_to_one(7, 20)
    weight = weight.to(compute_dtype(dtype))
    truth = reference.gather_sum(src.double(), index, weight.double(), offsets)
    assert_accurate(
        ops.gather_sum(src, index, weight, offsets), truth, reference.gather_sum(src, index, weight, offsets)
    )
    other, other_index = torch.randn(4, *size).to(dtype), torch.randint(4, (20,))
    truth = reference.row_dot(src.double(), other.double(), index, other_index)
    assert_accurate(
        ops.row_dot(src, other, index, other_index), truth, reference.row_dot(src, other, index, other_index)
    )


# Gradients


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradient_cases():
    labels, partner = torch.randint(5, (4,)), torch.randint(5, (4,))
    labels[0] = -100
    lam = torch.rand(4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64)
    index = torch.tensor([1, 1, 0, 2])
    target = mk.MixedTarget(labels, partner, lam.detach(), 2, 3, 0.3)
    return {
        "ce_entropy, index": (lambda z: mk.ce_entropy(z, labels, label_smoothing=0.1), doubles(4, 5)),
        "ce_entropy, mixed": (
            lambda z, lam: mk.ce_entropy(z, (labels, partner, lam), label_smoothing=0.1, class_weight=weight),
            doubles(4, 5),
            lam,
        ),
        "ce_entropy, dense": (lambda z, y: mk.ce_entropy(z, y, class_weight=weight), doubles(4, 5), doubles(4, 5)),
        "bce_entropy": (mk.bce_entropy, doubles(4, 5), doubles(4, 5)),
        "q_hat": (mk.q_hat, doubles(4, 5), doubles(4, 5)),
        "mixupe_loss": (lambda z: mk.mixupe_loss(z, target, eta=0.3, rescale=False), doubles(4, 5)),
        "mixupe_loss, threshold": (
            lambda z: mk.mixupe_loss(z, target, eta=0.3, rescale=False, penalty="threshold"),
            doubles(4, 5),
        ),
        "mixupe_loss, learned target": (
            lambda z, y: mk.mixupe_loss(
                z, mk.MixedTarget(y, y.flip(1), lam.detach(), 3, 2, 0.3), eta=0.3, rescale=False
            ),
            doubles(4, 5),
            doubles(4, 5),
        ),
        "mix, one lam": (
            lambda x, lam: mk.mix(x, index, lam),
            doubles(4, 3),
            torch.tensor(0.3).double().requires_grad_(),
        ),
        "mix, lam each": (lambda x, lam: mk.mix(x, index, lam), doubles(4, 3, 2), lam),
        "mix, flip": (lambda x, lam: mk.mix(x, "flip", lam), doubles(4, 3), lam),
        "mix, inside a box": (
            lambda x, lam: ops.mix(x, index, lam, torch.tensor([2, 0, 0, 3]), box=torch.tensor([1, 3, 0, 1])),
            doubles(4, 1, 3, 2),
            lam,
        ),
        "mix, many": (lambda x, w: mk.mix(x, index.view(2, 2)[[0, 1, 1, 0]], w), doubles(4, 3), doubles(4, 2)),
    }


GRADIENT_CASES = list(gradient_cases())


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradcheck(backend, name):
    function, *inputs = gradient_cases()[name]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_lam_has_a_gradient_through_uint8_images(backend):
    pixels, partner = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8), torch.tensor([1, 2, 3, 0])
    scale, shift = torch.rand(3) / 255, torch.randn(3)
    lam = torch.rand(4, requires_grad=True)
    upstream = torch.randn(4, 3, 2, 2)
    (actual,) = torch.autograd.grad(ops.mix(pixels, partner, lam, None, scale, shift, torch.float32), lam, upstream)
    difference = (pixels.float() - pixels[partner].float()) * scale.view(1, 3, 1, 1)
    torch.testing.assert_close(actual, (upstream * difference).sum((1, 2, 3)))


def test_linear_detached_has_the_gradient_of_cross_entropy(backend):
    logits = doubles(6, 5)
    labels = torch.randint(5, (6,))
    target = mk.MixedTarget(labels, labels, torch.ones(6), 0, 6, 0.3)
    loss = mk.mixupe_loss(logits, target, eta=0.5, penalty="linear_detached", rescale=False)
    ce = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], 0.5 * 0.3 * torch.autograd.grad(ce, logits)[0])


def opcheck_cases():
    z, zb = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True)
    labels, partner, lam = make_target("mixed", (6, 5), torch.float32)
    y = torch.rand(6, 5)
    eta, weight = torch.tensor(0.3), torch.tensor(0.25)
    _, entropy, lse = (t.detach() for t in ops.ce_entropy(z, labels, partner, lam))
    _, *saved = (t.detach() for t in ops.mixupe_loss(z, labels, partner, lam, eta, weight, 3, 3))
    x = torch.randn(6, 3, 4, 4, requires_grad=True)
    pixels = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    index, term_weight, offsets = many_to_one(6, 9)
    loss_tail = (labels, partner, lam, *saved, 3)
    return [
        ("mix", (x, partner, lam), {}),
        ("mix", (x, None, torch.tensor(0.3)), {}),
        ("mix", (pixels, partner, lam, labels, torch.rand(3), torch.rand(3), torch.float32, torch.channels_last), {}),
        ("mix", (x, partner, lam, None, None, None, None, None, torch.tensor([0, 2, 1, 4])), {}),
        ("mix_out", (x.detach(), partner, lam), {"out": torch.empty(6, 3, 4, 4)}),
        ("mixed_target", (labels, partner, lam.clone().requires_grad_(), index, 4), {}),
        ("mixed_target", (labels, None, torch.tensor(0.3), labels[:3], 2), {}),
        ("gather_sum", (x, index, term_weight.requires_grad_(), offsets), {}),
        ("row_dot", (x, x.detach().requires_grad_(), index, index.flip(0)), {}),
        ("ce_entropy", (z, labels), {}),
        ("ce_entropy", (zb, labels, partner, lam), {}),
        ("ce_entropy", (z, y, None, None, torch.rand(5), 0.1, -100, False), {}),
        ("ce_entropy", (z, y, None, None, None, 0.0, -100, True), {}),
        ("ce_entropy_backward", (lam, lam, None, z, entropy, lse, labels, partner, lam), {}),
        ("mixupe_loss", (z, labels, partner, lam, eta, weight, 3, 3), {}),
        ("mixupe_loss", (zb, labels, None, None, eta, weight, 6, 6, 1, 0.5, False, 0.1, False), {}),
        ("mixupe_loss_with_gradient", (z, labels, partner, lam, eta, weight, 3, 3), {}),
        ("mixupe_loss_backward", (eta, z, *loss_tail), {}),
        ("mixupe_loss_backward_out", (eta, z.detach(), *loss_tail), {"out": torch.empty(6, 5)}),
    ]


@pytest.mark.parametrize("case", range(19))
def test_opcheck(backend, case):
    name, args, kwargs = opcheck_cases()[case]
    torch.library.opcheck(getattr(ops, name).default, args, kwargs)


def test_opcheck_covers_every_operator():
    assert {name for name, *_ in opcheck_cases()} == set(mk.ops.operators())


def test_compiles_without_graph_breaks(backend):
    labels = torch.randint(5, (8,))
    target = mk.MixedTarget(labels, labels.flip(0), torch.rand(8), 4, 4, 0.3)
    criterion = mk.MixupELoss(eta=0.5)
    model = torch.nn.Linear(3, 5)

    def step(x, partner, lam):
        return criterion(model(mk.mix(x, partner, lam)), target)

    inputs = (torch.randn(8, 3), torch.randperm(8), torch.rand(8))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = step(*inputs), compiled(*inputs)
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, graph)


def test_autocast_gives_float32_losses(backend):
    model, x, labels = torch.nn.Linear(3, 5), torch.randn(8, 3), torch.randint(5, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        outputs = mk.ce_entropy(logits, labels)
    assert logits.dtype == torch.bfloat16 and outputs.ce.dtype == torch.float32
    outputs.ce.mean().backward()
    assert model.weight.grad.dtype == torch.float32


# Bad input

GOOD = {
    "x": torch.zeros(4, 3),
    "partner": torch.tensor([1, 2, 3, 0]),
    "logits": torch.zeros(4, 3),
    "labels": torch.tensor([0, 1, 2, 0]),
}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a batch dimension"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x must have dtype float32.*got int64"),
        ({"partner": torch.zeros(3, dtype=torch.int64)}, ValueError, r"partner must have shape \(4,\), got \(3,\)"),
        ({"partner": torch.zeros(4)}, TypeError, "partner must have dtype int64, got float32"),
        ({"partner": "shuffle"}, ValueError, "partner must be one of 'flip', got 'shuffle'"),
        ({"partner": torch.tensor([0, 1, 2, 4])}, ValueError, r"partner must be in \[0, 3\], got 4"),
        ({"partner": torch.tensor([0, -1, 2, 3])}, ValueError, r"partner must be in \[0, 3\], got -1"),
        ({"lam": 1.5}, ValueError, r"lam must be a number in \[0, 1\], got 1.5"),
        ({"lam": float("nan")}, ValueError, r"lam must be a number in \[0, 1\], got nan"),
        ({"lam": "half"}, TypeError, "lam must be a number"),
        ({"lam": torch.tensor(-0.5)}, ValueError, r"lam must be in \[0, 1\], got -0.5"),
        ({"lam": torch.tensor([0.1, 0.2, torch.nan, 0.3])}, ValueError, r"lam must be in \[0, 1\], got nan"),
        ({"lam": torch.zeros(3)}, ValueError, r"lam must have shape \(4,\), got \(3,\)"),
        ({"out": torch.zeros(4, 2)}, ValueError, r"out must have shape \(4, 3\), got \(4, 2\)"),
    ],
)
def test_mix_refuses(backend, change, error, message):
    arguments = {"x": GOOD["x"], "partner": GOOD["partner"], "lam": 0.5, **change}
    with pytest.raises(error, match=message):
        mk.mix(**arguments)


@pytest.mark.parametrize("name", ["x", "lam", "out"])
def test_out_is_refused_where_a_gradient_is_wanted(backend, name):
    values = {"x": torch.randn(4, 3), "lam": torch.rand(4), "out": torch.zeros(4, 3)}
    values[name].requires_grad_()

    def mix():
        return mk.mix(values["x"], "flip", values["lam"], out=values["out"])

    with pytest.raises(ValueError, match=f"{name} must not require a gradient with out"):
        mix()
    assert not values["out"].any()
    with torch.no_grad():
        torch.testing.assert_close(mix(), mk.mix(values["x"], "flip", values["lam"]))


def test_out_is_unchanged_by_bad_input(backend):
    out = torch.full((4, 3), 7.0)
    with pytest.raises(ValueError, match="partner must be in"):
        mk.mix(GOOD["x"], torch.tensor([0, 1, 2, 4]), 0.5, out=out)
    assert torch.equal(out, torch.full((4, 3), 7.0))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "logits must have dtype float32.*got int64"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits must have shape"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "logits must have shape"),
        ({"target": torch.tensor([0, 1, 2, 3])}, ValueError, r"target must be a class in \[0, 2\], got 3"),
        ({"target": torch.tensor([0, 1, -1, 2])}, ValueError, r"target must be a class in \[0, 2\], got -1"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target must have dtype int64, got int32"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have shape \(4,\), got \(3,\)"),
        ({"target": torch.zeros(4, 2)}, ValueError, r"target must have shape \(4, 3\), got \(4, 2\)"),
        (
            {"target": torch.zeros(4, device="meta")},
            ValueError,
            "target must be on the device of logits, cpu, got meta",
        ),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 1.5"),
        ({"class_weight": torch.zeros(4)}, ValueError, r"class_weight must have shape \(3,\), got \(4,\)"),
    ],
)
def test_ce_entropy_refuses(backend, change, error, message):
    arguments = {"logits": GOOD["logits"], "target": GOOD["labels"], **change}
    with pytest.raises(error, match=message):
        mk.ce_entropy(**arguments)


def test_any_index_may_be_ignored(backend):
    ce = mk.ce_entropy(GOOD["logits"], torch.tensor([0, 255, 255, 1]), ignore_index=255).ce
    assert torch.equal(ce == 0, torch.tensor([False, True, True, False]))


def test_the_fused_loss_refuses_gradients_it_does_not_have():
    logits, labels, lam = torch.randn(4, 3), torch.randint(3, (4,)), torch.rand(4, requires_grad=True)
    eta = torch.tensor(0.3)
    with pytest.raises(RuntimeError, match="differentiable in logits only"):
        ops.mixupe_loss(logits, labels, labels, lam, eta, eta, 2, 2)


def test_the_loss_made_with_its_gradient_has_none_to_autograd(backend):
    logits, labels, lam = (
        torch.randn(4, 3, requires_grad=True),
        torch.randint(3, (4,)),
        torch.rand(4, requires_grad=True),
    )
    eta = torch.tensor(0.3)
    outputs = ops.mixupe_loss_with_gradient(logits, labels, labels, lam, eta, eta, 2, 2)
    assert not any(output.requires_grad for output in outputs)
