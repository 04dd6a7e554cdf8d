"""The Triton kernels on CPU tensors, by Triton's interpreter, against the reference in float64.

Triton looks at TRITON_INTERPRET as it is imported, so these tests need a process of their own:
``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter.py`` (`make test` runs it); elsewhere they skip themselves.
"""

import inspect
import os

import pytest
import torch

from mixupe_kernels.ops import reference
from tests.cases import DTYPES, SHAPES, TARGETS, assert_accurate, compute_dtype, make_logits, make_target, to_double

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)
pytest.importorskip("triton")

import triton.runtime.interpreter

from mixupe_kernels.ops.triton import KERNELS, launch

# Arithmetic on -∞ and NaN is guarded, so NumPy, which the interpreter computes with, has nothing to warn about.
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def nan_filled_outputs():
    """torch fills what ``torch.empty`` returns with NaN in this mode: an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched so far."""
    names = []
    executor = triton.runtime.interpreter.GridExecutor
    call = executor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", counted)
    return names


def check(name, *args, **options):
    """Compare an operator with the reference in float64; return what it returned."""
    actual, peer = KERNELS[name](*args, **options), getattr(reference, name)(*args, **options)
    truth = getattr(reference, name)(*to_double(args), **options)
    as_tuple = [value if isinstance(value, tuple) else (value,) for value in (actual, truth, peer)]
    for one, exact, same_dtype in zip(*as_tuple, strict=True):
        # In float64 the truth has no more digits than what is compared with it: allow sums in another order.
        assert_accurate(one, exact, same_dtype, ulps=16.0 if one.dtype == torch.float64 else 4.0)
    return actual


def check_entropy(logits, target, **options):
    """ce_entropy and its backward with random upstream gradients; one of them None, one not of stride 1."""
    ce, entropy, lse = check("ce_entropy", logits, *target, **options)
    compute = compute_dtype(logits.dtype)
    grads = [torch.randn(ce.shape, dtype=compute), torch.randn(*ce.shape, 2, dtype=compute)[:, 0]]
    check(
        "ce_entropy_backward",
        *grads,
        torch.ones((), dtype=compute).expand_as(ce),
        logits,
        entropy,
        lse,
        *target,
        **options,
    )
    check("ce_entropy_backward", None, grads[1], None, logits, entropy, lse, *target, **options)


def check_loss(logits, target, num_mixed, num_reg, *, eta=0.3, rescale=True, **options):
    """mixupe_loss, its backward, and the backward into the logits themselves."""
    compute = compute_dtype(logits.dtype)
    weights = (torch.tensor(eta, dtype=compute), torch.tensor(0.25, dtype=compute))
    rows = {"num_mixed": num_mixed, "num_reg": num_reg}
    forward = {**rows, "rescale": rescale, **options}
    outputs = check("mixupe_loss", logits, *target, *weights, **forward)
    upstream = torch.tensor(1.7, dtype=compute)
    args = (*target, *outputs[1:])
    options = {"num_mixed": num_mixed} | {key: value for key, value in options.items() if key != "threshold"}
    gradient = check("mixupe_loss_backward", upstream, logits, *args, **options)
    with_gradient = KERNELS["mixupe_loss_with_gradient"](logits, *target, *weights, **forward)
    expected = KERNELS["mixupe_loss_backward"](torch.ones_like(upstream), logits, *args, **options)
    assert all(map(torch.equal, with_gradient, (*outputs[:2], expected)))
    # A copy with the logits' strides (a clone would be dense), overwritten by its own gradient.
    out = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
    assert KERNELS["mixupe_loss_backward_out"](upstream, out, *args, **options, out=out) is None
    assert torch.equal(out, gradient)
    return outputs[1]


def test_signatures_are_the_references():
    assert set(KERNELS) == {name for name in vars(reference) if name in KERNELS}
    for name, function in KERNELS.items():
        if name != "mixupe_loss_backward_out":  # the reference's takes *args
            expected = inspect.signature(getattr(reference, name)).parameters.values()
            actual = inspect.signature(function).parameters.values()
            assert [(p.name, p.kind, p.default) for p in actual] == [(p.name, p.kind, p.default) for p in expected]


# ce_entropy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ce_entropy(shape, kind, dtype):
    if shape[0]:
        check_entropy(make_logits(shape, dtype), make_target(kind, shape, dtype))
    else:
        outputs = KERNELS["ce_entropy"](make_logits(shape, dtype), *make_target(kind, shape, dtype))
        assert all(output.shape == (0,) for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed"])
def test_strided_rows(kind, dtype, layout):
    for shape in ((5, 33), (3, 1001)):
        check_entropy(make_logits(shape, dtype, layout), make_target(kind, shape, dtype))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_long_rows_split_and_looped(kind, dtype, launches, monkeypatch):
    shape = (2, 20003)
    logits, target = make_logits(shape, dtype), make_target(kind, shape, dtype)
    check_entropy(logits, target, label_smoothing=0.1)
    assert launches.count("merge_stats") == 1
    monkeypatch.setattr(launch, "PROGRAMS", 1)
    check_entropy(logits, target)
    assert launches.count("merge_stats") == 1


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("shape", [(9, 33), (3, 1001), (2, 9001)], ids=str)
def test_target_options(shape, kind, sigmoid):
    logits, target = make_logits(shape, torch.float32), make_target(kind, shape, torch.float32)
    if kind != "dense":
        target[0][0] = 7  # ignored here
        target[0][1] = -100  # and here, below
    class_weight = torch.rand(shape[1]) + 0.5
    class_weight[::5] = 0
    with_ignored = [-100] if kind == "dense" else [7, -100]
    for ignore_index in with_ignored:
        if ignore_index == 7:
            target[0][1] = 3
        elif kind != "dense":
            target[0][1] = -100
        for smoothing, weight in ((0.0, class_weight), (0.1, None), (0.1, class_weight)):
            options = {"label_smoothing": smoothing, "ignore_index": ignore_index, "sigmoid": sigmoid}
            check_entropy(logits, (*target, weight), **options)


@pytest.mark.parametrize("shape", [(6, 40), (4, 1000), (3, 9001)], ids=str)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_masked_logits_add_nothing(shape, sigmoid):
    logits = make_logits(shape, torch.float32)
    logits[:, 5:20] = -torch.inf
    logits[1, : shape[1] - 1] = -torch.inf
    labels = torch.full(shape[:1], shape[1] - 1)
    check_entropy(logits, (labels, None, None), sigmoid=sigmoid)
    check_entropy(logits, (labels, labels, torch.rand(shape[0])), sigmoid=sigmoid)
    check_entropy(logits, (torch.nn.functional.one_hot(labels, shape[1]).float(), None, None), sigmoid=sigmoid)


@pytest.mark.parametrize("columns", [40, 1001, 9001])
@pytest.mark.parametrize("kind", TARGETS)
def test_nan_and_labels_out_of_range_stay_in_their_row(columns, kind):
    logits = make_logits((4, columns), torch.float32)
    target = make_target(kind, logits.shape, torch.float32)
    clean = KERNELS["ce_entropy"](logits, *target)
    bad = logits.clone()
    bad[1, 3], bad[2] = torch.nan, -torch.inf
    for label in (-1, columns, 1 << 40):
        if kind != "dense":
            target[0][3] = label
        outputs = KERNELS["ce_entropy"](bad, *target)
        ones = torch.ones(4)
        gradient = KERNELS["ce_entropy_backward"](ones, ones, ones, bad, *outputs[1:], *target)
        assert all(torch.equal(one[:1], other[:1]) for one, other in zip(outputs, clean, strict=True))
        assert gradient[0].isfinite().all() and gradient[1:3].isnan().all()
        assert all(output[1:3].isnan().all() for output in outputs)
        if kind != "dense":
            assert outputs[0][3].isnan() and outputs[1][3].isfinite() and gradient[3].isnan().all()


def test_gradient_survives_p_that_rounds_to_one():
    logits = torch.zeros(3, 1000, dtype=torch.bfloat16)
    logits[:, 4] = torch.tensor([16.0, 18.0, 20.0], dtype=torch.bfloat16)
    labels = torch.full((3,), 4)
    _, entropy, lse = check("ce_entropy", logits, labels)
    args = (torch.ones(3), None, None, logits, entropy, lse, labels)
    gradient = KERNELS["ce_entropy_backward"](*args)
    truth = torch.softmax(logits.double(), 1)[:, 4] - 1
    # lse and p carry a rounding of float32 each, at 20 and at 1.
    assert (gradient[:, 4].double() - truth).abs().max() < 4 * 20 * torch.finfo(torch.float32).eps
    assert (gradient[:, 4] < 0).all()


# mixupe_loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0, 1, 2])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixupe_loss(dtype, kind, penalty):
    for shape, num_mixed, num_reg in (((19, 33), 12, 7), ((4, 1000), 4, 4), ((70, 3), 40, 30)):
        logits, target = make_logits(shape, dtype), make_target(kind, shape, dtype)
        check_loss(logits, target, num_mixed, num_reg, penalty=penalty)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_mixupe_loss_options(kind, sigmoid):
    shape = (9, 65)
    logits, target = make_logits(shape, torch.float32), make_target(kind, shape, torch.float32)
    if kind == "dense":
        target = (target[0] * 1.5, None, None)  # Σy ≠ 1
    check_loss(logits, target, 5, 6, sigmoid=sigmoid, label_smoothing=0.1, penalty=1, threshold=0.5, rescale=False)
    check_loss(logits, target, 0, 9, sigmoid=sigmoid)
    parts = check_loss(logits, target, 9, 0, sigmoid=sigmoid)
    assert parts[1] == 0
    assert check_loss(logits, target, 5, 4, eta=0.0, sigmoid=sigmoid)[2] == 1


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed"])
def test_mixupe_loss_layouts(layout):
    logits = make_logits((7, 1001), torch.bfloat16, layout)
    check_loss(logits, make_target("mixed", logits.shape, logits.dtype), 4, 3)


def test_ignored_rows_leave_both_means():
    logits = make_logits((12, 33), torch.float32)
    labels, partner, lam = make_target("mixed", logits.shape, torch.float32)
    labels[[1, 2, 8]] = -100
    partner[[2, 3, 9]] = -100
    check_loss(logits, (labels, partner, lam), 7, 5)
    check_loss(logits, (labels, None, None), 7, 5)
    parts = check_loss(logits, (torch.full_like(labels, -100), None, None), 7, 5)
    assert torch.equal(parts, torch.tensor([0.0, 0, 1, 0, 0]))


def test_label_out_of_range_makes_the_loss_nan():
    logits, eta = make_logits((8, 33), torch.float32), torch.tensor(0.1)
    for row in (0, 7):
        labels = torch.zeros(8, dtype=torch.int64)
        labels[row] = 33
        assert KERNELS["mixupe_loss"](logits, labels, None, None, eta, eta, 4, 4)[0].isnan()


@pytest.mark.parametrize("kind", TARGETS)
def test_split_rows_take_three_launches_and_one(kind, launches):
    logits, target = make_logits((3, 17000), torch.float32), make_target(kind, (3, 17000), torch.float32)
    eta, grad = torch.tensor(0.3), torch.tensor(1.0)
    _, *saved = KERNELS["mixupe_loss"](logits, *target, eta, eta, 2, 1)
    assert launches == ["row_stats", "merge_stats", "loss_total"]
    KERNELS["mixupe_loss_backward"](grad, logits, *target, *saved, 2)
    assert launches[3:] == ["row_gradient"]
    check_loss(logits, target, 2, 1)


def test_launch_counts(launches):
    logits, target = make_logits((8, 33), torch.float32), make_target("mixed", (8, 33), torch.float32)
    eta, grad, x = torch.tensor(0.3), torch.tensor(1.0), torch.randn(4, 3, 8, 8)
    _, *saved = KERNELS["mixupe_loss"](logits, *target, eta, eta, 4, 4)
    KERNELS["mixupe_loss_backward"](grad, logits, *target, *saved, 4)
    assert launches == ["row_stats", "loss_total", "row_gradient"]
    launches.clear()
    KERNELS["mix"](x, torch.randperm(4), torch.tensor(0.3), torch.tensor([0, 1, 2, 3]))
    KERNELS["mix"](x, None, torch.tensor(0.3))
    assert launches == ["mix_rows", "mix_pairs"]


@pytest.mark.parametrize("kind", TARGETS)
def test_empty_batch(kind, launches):
    logits, target = torch.empty(0, 5), make_target(kind, (0, 5), torch.float32)
    eta = torch.tensor(0.3)
    loss, parts, *saved = KERNELS["mixupe_loss"](logits, *target, eta, eta, 0, 0)
    assert loss == 0 and torch.equal(parts, torch.tensor([0.0, 0, 1, 0, 0]))
    assert KERNELS["mixupe_loss_backward"](eta, logits, *target, parts, *saved, 0).shape == (0, 5)
    assert launches == ["loss_total"]


def test_repeats_bit_for_bit():
    logits, target = make_logits((5, 17000), torch.float32), make_target("mixed", (5, 17000), torch.float32)
    eta = torch.tensor(0.3)
    first, second = (KERNELS["mixupe_loss"](logits, *target, eta, eta, 3, 2) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    index = torch.tensor([0, 1, 1, 2])
    assert torch.equal(*(KERNELS["row_dot"](logits, logits, index, index) for _ in range(2)))


def test_nothing_synchronises(monkeypatch):
    logits, target = make_logits((4, 33), torch.float32), make_target("mixed", (4, 33), torch.float32)
    eta, x, index = torch.tensor(0.3), torch.randn(4, 70), torch.tensor([1, 0, 3, 2])
    offsets, lam = torch.arange(5), torch.tensor([0.0, 1, 0.3, 0.6])

    def refused(*args, **kwargs):
        raise AssertionError("a value was read back from the device")

    for method in ("item", "nonzero", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, method, refused)
    _, *saved = KERNELS["mixupe_loss"](logits, *target, eta, eta, 2, 2)
    KERNELS["mixupe_loss_backward"](eta, logits, *target, *saved, 2)
    ce, entropy, lse = KERNELS["ce_entropy"](logits, *target)
    KERNELS["ce_entropy_backward"](ce, None, None, logits, entropy, lse, *target)
    KERNELS["mix"](x, index, lam, index)
    KERNELS["mix_out"](x, None, lam, out=x)
    KERNELS["mix"](x.view(4, 7, 10), index, lam, box=torch.tensor([1, 4, 0, 5]))
    KERNELS["gather_sum"](x, index, lam, offsets)
    KERNELS["row_dot"](x, x, index, index)


# mix, gather_sum, row_dot ---------------------------------------------------------------------------------------------

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 7), (1, 33), (6, 1500), (3, 3, 9, 7)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_mix(shape, flip, dtype):
    x, count = torch.randn(shape).to(dtype), shape[0]
    partner = None if flip else torch.randint(count, (count,))
    per_sample = torch.rand(count, dtype=compute_dtype(dtype))
    per_sample[::3], per_sample[1::3] = 0, 1
    for lam in (per_sample, per_sample.mean(), per_sample[:1].sum() * 0, per_sample.mean() * 0 + 1):
        check("mix", x, partner, lam)
        check("mix", x, partner, lam, torch.randint(count, (count,)))
        wide = torch.randn((count, 2, *shape[1:])).to(dtype)
        check("mix", wide[:, 1], partner, lam)
        out = wide[:, 0]
        assert KERNELS["mix_out"](x, partner, lam, out=out) is None
        assert torch.equal(out, KERNELS["mix"](x, partner, lam))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_flip_in_place(count):
    x, lam = torch.randn(count, 300), torch.rand(count)
    lam[::4] = 1
    expected = KERNELS["mix"](x, None, lam)
    KERNELS["mix_out"](x, None, lam, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [None, *FORMATS], ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_mix_normalises_casts_and_lays_out(layout, memory_format, dtype, out_dtype):
    x = torch.randint(256, (4, 3, 10, 9)).to(dtype).contiguous(memory_format=layout)
    scale, shift, lam = torch.rand(3) / 64, torch.randn(3), torch.tensor([0.0, 1, 0.2, 0.7])
    rows = torch.tensor([3, 0, 0, 1])
    for partner, chosen in ((torch.tensor([2, 2, 0, 1]), None), (None, None), (torch.tensor([1, 2, 3, 0]), rows)):
        mixed = check("mix", x, partner, lam, chosen, scale, shift, dtype=out_dtype, memory_format=memory_format)
        assert mixed.is_contiguous(memory_format=memory_format or layout)


@pytest.mark.parametrize("box", [(2, 5, 1, 4), (0, 10, 0, 9), (0, 0, 0, 0), (-1, 4, 5, 99)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout, shape", [(torch.contiguous_format, (4, 10, 9)), (torch.contiguous_format, (4, 3, 40, 33)),
                                           (torch.channels_last, (4, 3, 40, 33))], ids=str)  # fmt: skip
def test_mix_inside_a_box(layout, shape, dtype, box):
    x, box = torch.randint(256, shape).to(dtype).contiguous(memory_format=layout), torch.tensor(box)
    normalise = (torch.rand(shape[1]) / 64, torch.randn(shape[1])) if dtype == torch.uint8 else (None, None)
    out_dtype, lam = torch.float32 if dtype == torch.uint8 else dtype, torch.tensor([0.0, 1, 0.2, 0.7])
    rows = torch.tensor([3, 0, 0, 1])
    for partner, chosen in ((torch.tensor([2, 2, 0, 1]), None), (None, None), (None, rows)):
        for weight in (lam.to(compute_dtype(dtype)), torch.ones((), dtype=compute_dtype(dtype))):
            check("mix", x, partner, weight, chosen, *normalise, dtype=out_dtype, box=box)
            if dtype != torch.uint8:
                out = torch.full_like(x, torch.nan)
                KERNELS["mix_out"](x, partner, weight, chosen, None, None, box, out=out)
                assert torch.equal(out, KERNELS["mix"](x, partner, weight, chosen, box=box))


def test_a_sample_of_weight_zero_is_not_read():
    x = torch.randn(4, 50)
    x[2:] = torch.nan
    partner, lam = torch.tensor([2, 0, 0, 1]), torch.tensor([1.0, 0.5, 0.0, 0.0])
    mixed = KERNELS["mix"](x, partner, lam)
    assert torch.equal(mixed[[0, 2, 3]], x[[0, 0, 1]])
    assert torch.equal(KERNELS["mix"](x, None, torch.tensor([1.0, 1, 0, 0])), x[[0, 1, 1, 0]])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(), (5,)], ids=str)
def test_mixed_target(size, flip):
    labels, partner, lam = torch.randint(9, (5,)), None if flip else torch.randint(5, (5,)), torch.rand(size)
    for rows, num_mixed in ((torch.randperm(5), 3), (torch.randint(5, (300,)), 299), (torch.arange(0), 0)):
        arguments = (labels, partner, lam, rows, num_mixed)
        actual, expected = KERNELS["mixed_target"](*arguments), reference.mixed_target(*arguments)
        assert all(map(torch.equal, actual, expected))


def test_mixed_target_of_rows_out_of_range_has_a_lam_of_nan():
    labels, lam = torch.arange(3), torch.rand(3)
    for rows, partner in (([0, 3, 2, -1], [0, 1, 2]), ([0, 1, 2, 1], [0, 5, 2])):
        own_lam, *_ = KERNELS["mixed_target"](labels, torch.tensor(partner), lam, torch.tensor(rows), 4)
        assert own_lam.isnan().tolist() == [False, True, False, True]


def test_values_out_of_range_make_their_sample_nan():
    x, index = torch.randn(3, 50), torch.tensor([1, 0, 2])
    for bad in (-1, 3, 1 << 40):
        broken = torch.tensor([0, bad, 2])
        half = torch.tensor(0.5)
        mixed = (KERNELS["mix"](x, broken, half), KERNELS["mix"](x, index, half, broken))
        sums = KERNELS["gather_sum"](x, broken, torch.ones(3), torch.arange(4))
        dots = (KERNELS["row_dot"](x, x, broken, index), KERNELS["row_dot"](x, x, index, broken))
        for result in (*mixed, sums, *dots):
            assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
    assert KERNELS["mix"](x, index, torch.tensor([0.5, 1.1, 0.5]))[1].isnan().all()
    pairs = KERNELS["mix"](x, None, torch.tensor([-0.1, 0.5, 0.5]))
    assert pairs[0].isnan().all() and pairs[1:].isfinite().all()
    images, box = x.view(3, 5, 10), torch.tensor([0, 5, 0, 10])
    mixed = KERNELS["mix"](images, torch.tensor([1, 3, 2]), torch.tensor(0.5), box=box)
    assert mixed.isnan().any((1, 2)).tolist() == [False, True, False]
    pairs = KERNELS["mix"](images, None, torch.tensor([-0.1, 0.5, 0.5]), box=box)
    assert pairs.isnan().any((1, 2)).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 1500), (6, 3, 5, 7)], ids=str)
def test_gather_sum_of_a_map_many_to_one(shape, dtype):
    src = torch.randn(shape).to(dtype)
    index, offsets = torch.tensor([0, 5, 5, 2, 1, 1, 1]), torch.tensor([0, 2, 2, 6, 7])
    check("gather_sum", src, index, torch.randn(7, dtype=compute_dtype(dtype)), offsets)
    if len(shape) == 4:
        channels_last = src.contiguous(memory_format=torch.channels_last)
        check("gather_sum", channels_last, index, torch.randn(7, dtype=compute_dtype(dtype)), offsets)


def test_gather_sum_and_row_dot_of_nothing():
    src, none = torch.randn(4, 9), torch.empty(0, dtype=torch.int64)
    assert torch.equal(
        KERNELS["gather_sum"](src, none, torch.empty(0), torch.zeros(3, dtype=torch.int64)), torch.zeros(2, 9)
    )
    assert KERNELS["gather_sum"](src, none, torch.empty(0), torch.zeros(1, dtype=torch.int64)).shape == (0, 9)
    assert KERNELS["row_dot"](src, src, none, none).shape == (0,)
    assert torch.equal(KERNELS["mix"](src[:0], none, torch.tensor(0.5)), src[:0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 1500), (4, 3, 5, 7), (4, 40000)], ids=str)
def test_row_dot(shape, dtype):
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    check("row_dot", a, b, torch.tensor([0, 3, 3, 1]), torch.tensor([2, 2, 1, 0]))
    if len(shape) == 4:
        check("row_dot", a.contiguous(memory_format=torch.channels_last), b, torch.tensor([0, 3]), torch.tensor([2, 2]))


# The launch table -----------------------------------------------------------------------------------------------------


def entries():
    for family, tables in launch.TABLE.items():
        for dtype, table in tables.items():
            shorter = 0
            for longest in sorted(table):
                yield pytest.param(family, dtype, shorter + 1, id=f"{family}-{dtype}-{shorter + 1}")
                shorter = longest


@pytest.mark.parametrize(("family", "dtype", "length"), list(entries()))
def test_every_entry_of_the_launch_table(family, dtype, length, monkeypatch):
    used = []
    tile_for = launch.tile_for
    monkeypatch.setattr(launch, "tile_for", lambda *args: used.append((args, tile_for(*args))) or used[-1][1])
    x, index = torch.randn(3, length, dtype=dtype), torch.tensor([1, 2, 0])
    if family == "mix":
        check("mix", x, index, torch.tensor(0.3, dtype=dtype))
    elif family == "sum":
        check("row_dot", x, x, index, index)
        check("gather_sum", x, index, torch.rand(3, dtype=dtype), torch.arange(4))
    else:
        targets = x.softmax(1) if family.endswith(("_dense", "_summed")) else index.clamp(max=length - 1)
        check_entropy(x, (targets, None, None))
    table = launch.TABLE[family][dtype]
    expected = table[min(longest for longest in table if longest >= length)]
    assert ((family, dtype, length), expected) in used


def test_neighbours_try_other_stages_of_a_loop_only():
    tile = launch.tile_for("row_stats", torch.float32, 5000)
    plain, looped = (list(launch.neighbours(tile, looped)) for looped in (False, True))
    assert plain == looped[: len(plain)] and {other.stages for other in plain} == {tile.stages}
    assert {other.stages for other in looped} == set(launch.STAGES)
    assert all(other == tile._replace(stages=other.stages) for other in looped[len(plain) :])


@pytest.mark.parametrize("length, tiles", [(5000, 7), (3000, 5)])
def test_autotuning_of_rows_tries_stages_where_they_loop(monkeypatch, length, tiles):
    monkeypatch.setenv("MIXUPE_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_tuned", {})
    timed = []
    monkeypatch.setattr(triton.testing, "do_bench", lambda run: timed.append(run()) or len(timed))
    KERNELS["ce_entropy"](torch.randn(3, length), torch.tensor([0, 1, 2]))
    assert len(timed) == tiles and list(launch._tuned.values()) == [launch.tile_for("row_stats", torch.float32, length)]


def test_autotuning_takes_the_fastest_neighbour(monkeypatch, capsys):
    monkeypatch.setenv("MIXUPE_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_tuned", {})
    timed = []

    def do_bench(run):
        run()
        timed.append(run)
        return -len(timed)  # the last one is the fastest

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    x, lam = torch.randn(3, 600), torch.tensor(0.3)
    expected = reference.mix(x, None, lam)
    for _ in range(2):
        torch.testing.assert_close(KERNELS["mix"](x, None, lam), expected)
    *_, last = launch.neighbours(launch.tile_for("mix", torch.float32, 600), looped=False)
    assert len(timed) == 5 and list(launch._tuned.values()) == [last]
    assert str(last) in capsys.readouterr().out
    KERNELS["mix_out"](x, None, lam, out=x)  # in place, a second run would mix twice
    assert len(timed) == 5
    torch.testing.assert_close(x, expected)
