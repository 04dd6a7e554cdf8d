"""mixupe_loss, its backwards and the loss made with its gradient, against the reference in float64."""

import itertools

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels import conventions

from ..cases import (
    DTYPES,
    LAYOUTS,
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
COUNTS = [("halves", 10, 10), *thorough(("split", 15, 5), ("mixed", 20, 20)), ("none", 20, 0)]


def check_mixupe_loss(
    logits, target, counts, *, penalty=0, threshold=0.5, rescale=True, smoothing=0.0, sigmoid=False, gamma=0.0
):
    """The loss, its backward for some upstream gradient, into a buffer and into the logits, and both at once."""
    eta, reg_weight, grad = (torch.tensor(value, dtype=compute_dtype(logits.dtype)) for value in (0.7, 0.3, 1.7))
    tail = (smoothing, sigmoid)
    arguments = (logits, *target, eta, reg_weight, *counts, penalty, threshold, rescale, *tail, gamma)
    loss, parts, *rows = check("mixupe_loss", *arguments, ulps=16)
    backward = (logits, *target, parts, *rows, counts[0], penalty, *tail)
    dz = check("mixupe_loss_backward", grad, *backward, ulps=16)
    assert dz.actual.is_contiguous()
    own = [value.actual if isinstance(value, Computed) else value for value in backward[1:]]
    out = torch.full_like(dz.actual, torch.nan)
    assert ops.mixupe_loss_backward_out(grad, logits, *own, out=out) is None
    assert torch.equal(out, dz.actual)
    # A copy laid out as the logits are, as sums on CUDA start from the first aligned address; overwritten by its own gradient.
    in_place = torch.empty(logits.untyped_storage().nbytes() // logits.element_size(), dtype=logits.dtype)
    in_place = in_place.as_strided(logits.shape, logits.stride(), logits.storage_offset()).copy_(logits)
    ops.mixupe_loss_backward_out(grad, in_place, *own, out=in_place)
    assert torch.equal(in_place, dz.actual)
    with_gradient = ops.mixupe_loss_with_gradient(*arguments)
    assert torch.equal(with_gradient[0], loss.actual) and torch.equal(with_gradient[1], parts.actual)
    expected = compute("mixupe_loss_backward", torch.ones_like(grad), *backward)
    assert_accurate(with_gradient[2], *expected[1:], ulps=16)
    return parts.actual


@pytest.mark.parametrize("penalty", range(len(conventions.PENALTIES)), ids=conventions.PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*TARGETS, "sigmoid"])
@pytest.mark.parametrize("counts", COUNTS, ids=lambda case: case[0])
def test_mixupe_loss(backend, counts, kind, dtype, penalty):
    sigmoid = kind == "sigmoid"
    target = make_target("dense" if sigmoid else kind, (20, 37), dtype)
    gamma = 0.0 if counts[0] == "mixed" else 0.25
    check_mixupe_loss(make_logits((20, 37), dtype), target, counts[1:], penalty=penalty, sigmoid=sigmoid, gamma=gamma)


# About the lengths and sizes from which the compiled operator takes a second exponential instead of keeping the first.
SIZES = [(3, 2048), *thorough((3, 2049), (1038, 1009), (1040, 1009), (2079, 1009))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_many_logits(backend, shape, dtype):
    counts = (shape[0] // 2, shape[0] - shape[0] // 2)
    for gamma in (0.0, 1 / 3):
        check_mixupe_loss(make_logits(shape, dtype), make_target("mixed", shape, dtype), counts, gamma=gamma)


# The compiled operator takes rows of at most 16 classes 16 at a time.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 10), *thorough((16, 16), (15, 2), (17, 17))], ids=str)
def test_rows_of_few_classes(backend, shape, dtype):
    logits, (labels, partner_labels, lam) = make_logits(shape, dtype), make_target("mixed", shape, dtype)
    logits[3, 1:], labels[3], partner_labels[3] = -torch.inf, 0, 0
    labels[[5, 12]], partner_labels[[6, 12]] = -100, -100
    target, counts = (labels, partner_labels, lam), (shape[0] // 2, shape[0] - shape[0] // 3)
    for penalty in range(len(conventions.PENALTIES)):
        check_mixupe_loss(logits, target, counts, penalty=penalty, rescale=penalty == 0, gamma=0.25)
    # A row's numbers are the same wherever it is, and whatever is beside it.
    every = ops.ce_entropy(logits, *target)
    logits[1] = torch.nan
    beside = ops.ce_entropy(logits, *target)
    for row in (0, 1, 3, 12, shape[0] - 1):
        alone = ops.ce_entropy(*(part[row : row + 1] for part in (logits, *target)))
        for values, others, value in zip(every, beside, alone, strict=True):
            assert value.isnan() if row == 1 else values[row] == others[row] == value


# Rows that Triton splits, in parts that are loops: dense ones are so at half the length, where its interpreter takes a third of the time.
SPLIT = [("index", (3, 17000)), ("mixed", (3, 17000)), ("dense", (3, 9001)), *thorough(("dense", (3, 17000)))]
SHORT = itertools.product(TARGETS, [(1, 1), (2, 2), (70, 3)])
MORE = itertools.product(TARGETS, [(4, 21841), (300, 3)])


@pytest.mark.parametrize("case", [*SHORT, *SPLIT, *thorough(*MORE)], ids=str)
@pytest.mark.parametrize("smoothing, rescale", [(0.0, False), (0.1, True)])
def test_shapes_and_options(backend, case, smoothing, rescale):
    kind, shape = case
    counts = (shape[0] - shape[0] // 2, shape[0] // 2)
    target = make_target(kind, shape, torch.float32)
    check_mixupe_loss(make_logits(shape, torch.float32), target, counts, smoothing=smoothing, rescale=rescale)


@pytest.mark.parametrize("gamma", [0.0, 2.0, *thorough(0.1)])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", TARGETS)
def test_rows_of_either_mean_or_neither(backend, kind, sigmoid, gamma):
    logits, target = make_logits((9, 65), torch.float32), make_target(kind, (9, 65), torch.float32)
    if kind == "dense":
        target = (target[0] * 1.5, None, None)  # Σy ≠ 1
    options = {"sigmoid": sigmoid, "smoothing": 0.1, "gamma": gamma}
    check_mixupe_loss(logits, target, (5, 6), penalty=1, rescale=False, **options)
    check_mixupe_loss(logits, target, (0, 9), **options)
    check_mixupe_loss(logits, target, (3, 3), **options)
    parts = check_mixupe_loss(logits, target, (9, 0), **options)
    assert parts[1] == parts[2] == 0  # no clean row, no R


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype):
    for shape in ((20, 37), (7, 1001)):
        counts = (shape[0] // 2, shape[0] // 3)
        check_mixupe_loss(make_logits(shape, dtype, layout), make_target("mixed", shape, dtype), counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_entropy_keeps_its_slope(backend, dtype):
    """H = 0 has a sign in what the backward keeps: here R = |0 - 2000|, whose gradient is that of the cross-entropy."""
    logits, label = torch.tensor([[2000.0, 0, 0]], dtype=dtype), torch.tensor([1])
    weights = [torch.tensor(value, dtype=compute_dtype(dtype)) for value in (0.5, 0.25, 1.0)]
    _, *saved = ops.mixupe_loss(logits, label, None, None, *weights[:2], 0, 1, 0, 1.0, False)
    gradient = ops.mixupe_loss_backward(weights[2], logits, label, None, None, *saved, 0)
    assert gradient.tolist() == [[0.125, -0.125, 0]]


def test_ignored_rows_leave_both_means(backend):
    logits = make_logits((20, 37), torch.float32)
    labels, partner_labels, lam = make_target("mixed", logits.shape, torch.float32)
    labels[[0, 4, 15]] = -100
    partner_labels[[4, 5, 16]] = -100
    check_mixupe_loss(logits, (labels, None, None), (10, 10))
    check_mixupe_loss(logits, (labels, partner_labels, lam), (10, 10))
    check_mixupe_loss(logits, (labels, partner_labels, lam), (10, 10), gamma=0.25)
    for gamma in (0.0, 0.25):
        parts = check_mixupe_loss(logits, (torch.full_like(labels, -100), None, None), (10, 10), gamma=gamma)
        assert parts.tolist() == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_a_loss_of_ignored_rows_is_zero(backend, gamma):
    logits, ignored = torch.randn(4, 5, requires_grad=True), torch.full((4,), -100)
    loss = mk.mixupe_loss(
        logits, mk.MixedTarget(ignored, ignored, torch.ones(4), 2, 2, 0.3), eta=1.0, clean_weight=gamma
    )
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(4, 5))


@pytest.mark.parametrize("kind", TARGETS)
def test_empty_batch(backend, kind):
    logits, target, eta = torch.zeros(0, 5), make_target(kind, (0, 5), torch.float32), torch.tensor(0.3)
    loss, parts, *saved = ops.mixupe_loss(logits, *target, eta, eta, 0, 0, clean_weight=0.25)
    assert loss == 0 and parts.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert ops.mixupe_loss_backward(eta, logits, *target, parts, *saved, 0).shape == (0, 5)


def test_leading_dimensions_are_rows(backend):
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(5, (2, 3, 4))
    target = mk.MixedTarget(labels, labels.flip(0), torch.tensor([0.3, 1.0]), 1, 1, 0.25)
    rows = mk.MixedTarget(*(t.reshape(-1) for t in target[:2]), target.lam.repeat_interleave(12), 12, 12, 0.25)
    assert mk.mixupe_loss(logits, target, eta=0.5) == mk.mixupe_loss(logits.reshape(-1, 5), rows, eta=0.5)


@pytest.mark.host
def test_results_do_not_depend_on_threads_or_runs(backend, slow):
    shape = (31 if slow else 301, 517)  # kernels for devices are not for the CPU's threads
    logits, target, eta = (
        make_logits(shape, torch.float32),
        make_target("mixed", shape, torch.float32),
        torch.tensor(0.5),
    )

    def run():
        return ops.mixupe_loss_with_gradient(logits, *target, eta, eta, shape[0] - shape[0] // 3, shape[0] // 3)

    first = run()
    try:
        torch.set_num_threads(1)
        single = run()
    finally:
        torch.set_num_threads(2)
    assert all(map(torch.equal, first, run()))
    if backend != "reference":  # eager reductions split by thread
        assert all(map(torch.equal, first, single))


def test_linear_detached_has_the_gradient_of_cross_entropy(backend):
    logits, labels = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    target = mk.MixedTarget(labels, labels, torch.ones(6), 0, 6, 0.3)
    loss = mk.mixupe_loss(logits, target, eta=0.5, penalty="linear_detached", rescale=False)
    ce = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], 0.5 * 0.3 * torch.autograd.grad(ce, logits)[0])


def test_a_loss_has_a_gradient_in_its_logits_only():
    logits, labels, lam = torch.randn(4, 3), torch.randint(3, (4,)), torch.rand(4, requires_grad=True)
    eta = torch.tensor(0.3)
    with pytest.raises(RuntimeError, match="differentiable in logits only"):
        ops.mixupe_loss(logits, labels, labels, lam, eta, eta, 2, 2)


def test_the_loss_made_with_its_gradient_has_none_to_autograd(backend):
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.randint(3, (4,))
    lam, eta = torch.rand(4, requires_grad=True), torch.tensor(0.3)
    outputs = ops.mixupe_loss_with_gradient(logits, labels, labels, lam, eta, eta, 2, 2)
    assert not any(output.requires_grad for output in outputs)
