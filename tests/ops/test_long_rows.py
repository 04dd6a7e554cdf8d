"""Few long rows, which backends for devices cut into parts: what the parts share, and where one of them ends."""

import pytest
import torch

from ..cases import DTYPES, Computed, check, compute_dtype, make_logits, make_target, thorough
from .test_ce_entropy import check_ce_entropy

ops = torch.ops.mixupe
pytestmark = pytest.mark.for_devices

# Parts are of 4096 columns or more: rows of one, of two, of several. Odd lengths, so that rows and parts of theirs lie unaligned.
CALLS = [
    ((3, 9001), torch.float32, "contiguous"),
    *thorough(
        *(((3, 9001), dtype, layout) for dtype in DTYPES[1:] for layout in ("contiguous", "sliced")),
        ((1, 4099), torch.float32, "contiguous"),
        ((1, 30011), torch.bfloat16, "sliced"),
        ((8, 30011), torch.float32, "sliced"),
        ((8, 128256), torch.bfloat16, "contiguous"),
        ((3, 128256), torch.float32, "contiguous"),
    ),
]
KINDS = ["index", "mixed", "dense", "sigmoid", "sigmoid, mixed"]
PLACES = [
    0,
    1,
    63,
    64,
    4095,
    4096,
    4543,
    4544,
    4545,
    7519,
    7552,
    8992,
    9000,
]  # of 9001: the ends of parts and about them


def target_of(kind, shape, dtype):
    """(target, whether it is a sigmoid's)."""
    sigmoid = kind.startswith("sigmoid")
    return make_target("dense" if kind == "sigmoid" else kind.removeprefix("sigmoid, "), shape, dtype), sigmoid


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_target(backend, call, kind):
    shape, dtype, layout = call
    target, sigmoid = target_of(kind, shape, dtype)
    check_ce_entropy(make_logits(shape, dtype, layout), target, sigmoid=sigmoid)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_target_options(backend, kind, dtype):
    shape = (2, 9001)
    target, sigmoid = target_of(kind, shape, dtype)
    weight = torch.rand(shape[1], dtype=compute_dtype(dtype)) + 0.5
    weight[::5] = 0
    if target[0].dim() == 1:
        target[0][0] = -100  # ignored, in one of the two labels or in the only one
    for smoothing, class_weight in ((0.1, None), (0.0, weight), (0.1, weight)):
        options = {"smoothing": smoothing, "class_weight": class_weight, "sigmoid": sigmoid}
        check_ce_entropy(make_logits(shape, dtype, "sliced"), target, **options)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, *thorough(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("apart", [1, *thorough(0, 2, 3, 4, 5, 6)])
def test_labels_at_the_ends_of_parts(backend, apart, dtype, sigmoid):
    """A row for each place and the one that lies ``apart`` in the list; the same twice where that is 0."""
    labels = torch.tensor(PLACES)
    lam = torch.rand(len(labels), dtype=compute_dtype(dtype))
    logits, tail = make_logits((len(labels), 9001), dtype), (labels, labels.roll(apart), lam, None, 0.0, -100, sigmoid)
    _, *saved = check("ce_entropy", logits, *tail)
    check("ce_entropy_backward", *torch.randn(3, len(labels), dtype=lam.dtype), logits, *saved, *tail)


@pytest.mark.thorough
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_parts_add_nothing(backend, dtype, sigmoid):
    """The first part, the last one, all but a column of one and of the other."""
    logits = make_logits((5, 9001), dtype)
    for row, masked in enumerate([slice(0, 5000), slice(4000, 9001), slice(1, 9000), slice(0, 9000)]):
        logits[row, masked] = -torch.inf
    labels = torch.tensor([9000, 0, 0, 9000, 7])
    dense = torch.nn.functional.one_hot(labels, 9001).to(compute_dtype(dtype))
    for target in ((labels, None, None), (labels, labels, torch.rand(5, dtype=dense.dtype)), (dense, None, None)):
        check_ce_entropy(logits, target, sigmoid=sigmoid)


@pytest.mark.thorough
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["mixed", "dense"])
def test_nan_and_rows_of_nothing_stay_to_themselves(backend, kind, sigmoid):
    shape = (4, 20003)
    target, logits, ones = make_target(kind, shape, torch.float32), make_logits(shape, torch.float32), torch.ones(4)
    tail = (*target, None, 0.0, -100, sigmoid)

    def run():
        outputs = ops.ce_entropy(logits, *tail)
        return (*outputs, ops.ce_entropy_backward(ones, ones, ones, logits, *outputs[1:], *tail))

    clean = run()
    logits[1, 19000], logits[2] = torch.nan, torch.nan if sigmoid else -torch.inf
    for part, expected in zip(run(), clean, strict=True):
        assert torch.equal(part[[0, 3]], expected[[0, 3]]) and part[2].isnan().all()
        assert part[1].isnan().sum() >= 1 if sigmoid else part[1].isnan().all()


# Far from 0 a row's sums are made again for its gradient: nothing of the row may have been written by then.
@pytest.mark.parametrize("shift", [300.0, *thorough(0.0, -300.0)])
@pytest.mark.parametrize("dtype", [torch.float32, *thorough(torch.bfloat16, torch.float64)], ids=str)
@pytest.mark.parametrize("kind, smoothing", [("mixed", 0.0), ("mixed", 0.1), ("dense", 0.0)])
@pytest.mark.parametrize("shape", [(3, 9001), *thorough((2, 30016), (1, 128256))], ids=str)
def test_the_gradient_in_place(backend, shape, kind, smoothing, dtype, shift):
    logits, target = make_logits(shape, dtype) + shift, make_target(kind, shape, dtype)
    one, rows = torch.ones((), dtype=compute_dtype(dtype)), shape[0]
    tail = (rows - 1, 0, smoothing)
    _, parts, *saved = check("mixupe_loss", logits, *target, one, one, rows - 1, 1, 0, 1.0, True, smoothing)
    upstream = (one, logits, *target, Computed(*(p for p in parts)), *saved, *tail)
    expected = check("mixupe_loss_backward", *upstream).actual
    out = logits.clone()
    ops.mixupe_loss_backward_out(one, out, *target, parts.actual, *(s.actual for s in saved), *tail, out=out)
    assert torch.equal(out, expected)
