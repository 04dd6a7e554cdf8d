"""ce_entropy and its backward: shapes, dtypes, targets, options and layouts, against the reference in float64."""

import pytest
import torch

import mixupe_kernels as mk

from ..cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TARGETS,
    Computed,
    assert_accurate,
    check,
    compute,
    compute_dtype,
    make_logits,
    make_target,
    thorough,
)

ops = torch.ops.mixupe


def check_ce_entropy(logits, target, *, class_weight=None, smoothing=0.0, ignore_index=-100, sigmoid=False):
    """Forward, and backward with random upstream gradients: all three, and one of them at a time."""
    options = (*target, class_weight, smoothing, ignore_index, sigmoid)
    _, *saved = check("ce_entropy", logits, *options)
    # Strides other than 1: every other value, and one value for all rows, as an expanded gradient has it.
    upstream = torch.randn(logits.shape[0], 2, dtype=compute_dtype(logits.dtype))
    gradients = (upstream[:, 0], upstream[:, 1], upstream.new_ones(()).expand(logits.shape[0]))
    for chosen in ((0, 1, 2), (0,), (1,)):
        grads = [gradients[i] if i in chosen else None for i in range(3)]
        dz = check("ce_entropy_backward", *grads, logits, *saved, *options)
        assert dz.actual.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ce_entropy(backend, shape, kind, dtype):
    check_ce_entropy(make_logits(shape, dtype), make_target(kind, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bce_entropy(backend, shape, dtype):
    check_ce_entropy(make_logits(shape, dtype), make_target("dense", shape, dtype), sigmoid=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *thorough(torch.float64, torch.float16)], ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, kind, dtype):
    for shape in ((9, 37), (3, 1001)):
        check_ce_entropy(make_logits(shape, dtype, layout), make_target(kind, shape, dtype), smoothing=0.1)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("shape", [(9, 33), (3, 1001), *thorough((2, 9001))], ids=str)
def test_target_options(backend, shape, kind, sigmoid):
    logits, target = make_logits(shape, torch.float32), make_target(kind, shape, torch.float32)
    class_weight = torch.rand(shape[1]) + 0.5
    class_weight[::5] = 0
    for ignored in [-100] if kind == "dense" else [-100, 7]:
        if kind != "dense":
            target[0][1] = ignored
        for smoothing, weight in ((0.0, class_weight), (0.1, None), (0.1, class_weight)):
            options = {"smoothing": smoothing, "class_weight": weight, "ignore_index": ignored, "sigmoid": sigmoid}
            check_ce_entropy(logits, target, **options)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *thorough(torch.float32)], ids=str)
def test_labels_at_the_ends_of_rows(backend, dtype, sigmoid):
    """Each of the first and last columns in rows of every alignment: what lies outside whole vectors has loops of its own."""
    places = torch.cat([torch.arange(9), torch.arange(993, 1001)])
    labels = places.repeat(8)
    logits, lam = make_logits((len(labels), 1001), dtype), torch.rand(len(labels), dtype=compute_dtype(dtype))
    tail = (labels, labels.roll(1), lam, None, 0.0, -100, sigmoid)
    _, *saved = check("ce_entropy", logits, *tail)
    check("ce_entropy_backward", *torch.randn(3, len(labels), dtype=lam.dtype), logits, *saved, *tail)


@pytest.mark.thorough  # Triton's are split, in test_triton_interpreter.py
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_long_rows(backend, dtype, kind):
    shape = (2, 20003)
    check_ce_entropy(make_logits(shape, dtype), make_target(kind, shape, dtype), smoothing=0.1)


@pytest.mark.parametrize("kind", ["index", "mixed"])
def test_ignored_labels_add_nothing(backend, kind):
    shape = (8, 11)
    labels, partner_labels, lam = make_target(kind, shape, torch.float32)
    labels[[0, 3, 4]] = -100
    if partner_labels is not None:
        partner_labels[[3, 5]] = -100
    logits = make_logits(shape, torch.float32)
    target = (labels, partner_labels, lam)
    check_ce_entropy(logits, target, smoothing=0.1)
    ce, entropy, lse = ops.ce_entropy(logits, *target)
    assert ce[3] == 0
    dz = ops.ce_entropy_backward(torch.ones(8), None, None, logits, entropy, lse, *target)
    assert torch.equal(dz[3], torch.zeros(11))


def test_any_index_may_be_ignored(backend):
    ce = mk.ce_entropy(torch.zeros(4, 3), torch.tensor([0, 255, 255, 1]), ignore_index=255).ce
    assert (ce == 0).tolist() == [False, True, True, False]


def test_leading_dimensions_are_rows(backend):
    logits = torch.randn(2, 3, 4, 5)
    labels = torch.randint(5, (2, 3, 4))
    outputs = mk.ce_entropy(logits, labels)
    flat = mk.ce_entropy(logits.reshape(-1, 5), labels.reshape(-1))
    assert outputs.ce.shape == (2, 3, 4)
    for output, expected in zip(outputs, flat, strict=True):
        assert torch.equal(output.reshape(-1), expected)


# Logits at the ends of their range


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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of ∞ - ∞
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", [*EXTREMES, "infinite", "nan"])
def test_extreme_logits(backend, name, kind):
    logits = extreme_logits(name)
    target = make_target(kind, logits.shape, torch.float32)
    if kind == "dense":
        target[0][logits.isinf()] = 0  # a masked class has no share in a dense target
    ce, entropy, _ = check("ce_entropy", logits, *target)
    if name in ("all masked", "infinite", "nan"):
        assert entropy.actual.isnan().all()
        assert ce.actual.isnan().all() or (kind == "dense" and name == "all masked")  # no target mass there
    if name.startswith("shifted"):
        # fp32 rounding of CE and H themselves, not of the shift.
        q, expected = (entropy[i].double() - ce[i].double() for i in range(2))
        scale = torch.maximum(ce.truth.abs(), entropy.truth)
        assert ((q - expected).abs() <= 8 * torch.finfo(torch.float32).eps * scale.clamp(min=1)).all()


@pytest.mark.parametrize("name", EXTREMES[:-1])
def test_gradients_of_extreme_logits(backend, name):
    logits, labels, upstream = extreme_logits(name), torch.full((6,), 4), torch.randn(3, 6)
    _, entropy, lse = compute("ce_entropy", logits, labels)
    dz = compute("ce_entropy_backward", *upstream, logits, entropy, lse, labels)
    # p = e^(z - lse) inherits the rounding of lse in float32: half an ulp of |lse|, 5e-4 at 1e4.
    bound = 1e-5 + 2 * torch.finfo(torch.float32).eps * lse.truth.abs().max()
    assert ((dz.actual - dz.truth).abs() <= bound * (1 + dz.truth.abs())).all()


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(6, 40), (4, 1000), *thorough((3, 9001))], ids=str)
def test_masked_logits_add_nothing(backend, shape, sigmoid):
    logits = make_logits(shape, torch.float32)
    logits[:, 5:20] = -torch.inf
    logits[1, : shape[1] - 1] = -torch.inf
    labels = torch.full(shape[:1], shape[1] - 1)
    check_ce_entropy(logits, (labels, None, None), sigmoid=sigmoid)
    check_ce_entropy(logits, (labels, labels, torch.rand(shape[0])), sigmoid=sigmoid)
    check_ce_entropy(logits, (torch.nn.functional.one_hot(labels, shape[1]).float(), None, None), sigmoid=sigmoid)


@pytest.mark.parametrize("columns", [40, 1001, *thorough(9001)])
@pytest.mark.parametrize("kind", TARGETS)
def test_nan_stays_in_its_row(backend, kind, columns):
    logits = make_logits((4, columns), torch.float32)
    target, ones = make_target(kind, logits.shape, torch.float32), torch.ones(4)
    clean = ops.ce_entropy(logits, *target)
    logits[1, 3], logits[2] = torch.nan, -torch.inf
    outputs = ops.ce_entropy(logits, *target)
    dz = ops.ce_entropy_backward(ones, ones, ones, logits, *outputs[1:], *target)
    for output, expected in zip(outputs, clean, strict=True):
        assert torch.equal(output[[0, 3]], expected[[0, 3]]) and output[1:3].isnan().all()
    assert dz[[0, 3]].isfinite().all() and dz[1:3].isnan().all()


def test_results_repeat_bit_for_bit(backend):
    logits, labels = make_logits((5, 17000), torch.float32), torch.randint(17000, (5,))
    first, again = (ops.ce_entropy(logits, labels) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("weighted", [False, True])
def test_smoothed_labels_are_cross_entropys(backend, weighted):
    """Against PyTorch's own operator, whose error is the measure here, not the reference's."""
    logits, labels = make_logits((4, 301), torch.float32), torch.randint(301, (4,))
    weight = torch.rand(301) + 0.5 if weighted else None
    options = {"reduction": "none", "label_smoothing": 0.1}
    actual, *_ = ops.ce_entropy(logits, labels, None, None, weight, 0.1)
    expected, torchs = (
        torch.nn.functional.cross_entropy(z, labels, weight=None if weight is None else weight.to(z), **options)
        for z in (logits.double(), logits)
    )
    assert_accurate(*Computed(actual, expected, torchs))
