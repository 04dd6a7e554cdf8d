"""Classifier and loss fused: the value and gradients of the two apart, in the memory of a chunk."""

import pytest
import torch

import mixupe_kernels as mk


def problem(dtype=torch.float64, rows=10, features=6, classes=7):
    hidden, weight = torch.randn(rows, features, dtype=dtype), torch.randn(classes, features, dtype=dtype)
    labels = torch.randint(classes, (rows,))
    labels[1] = -100
    target = mk.MixedTarget(labels, labels.roll(1), torch.rand(rows), rows - 4, 4, 0.3)
    return hidden, weight, torch.randn(classes, dtype=dtype), target


@pytest.mark.parametrize("chunk_rows", [1, 3, 10, 99, None])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("penalty", ["abs", "threshold", "linear_detached"])
def test_equals_the_unfused_form(penalty, with_bias, chunk_rows):
    hidden, weight, bias, target = problem()
    inputs = [tensor.requires_grad_() for tensor in ((hidden, weight, bias) if with_bias else (hidden, weight))]
    options = {"eta": 0.4, "clean_weight": 0.6, "penalty": penalty, "label_smoothing": 0.1}
    fused = mk.linear_mixupe_loss(
        hidden, weight, target, bias=bias if with_bias else None, chunk_rows=chunk_rows, **options
    )
    unfused = mk.mixupe_loss(torch.nn.functional.linear(*inputs), target, **options)
    torch.testing.assert_close(fused, unfused)
    for ours, theirs in zip(*(torch.autograd.grad(2 * loss, inputs) for loss in (fused, unfused)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["index", "dense", "sigmoid"])
def test_other_targets(kind):
    hidden, weight, bias, _ = problem()
    target = torch.randint(7, (10,)) if kind == "index" else torch.rand(10, 7, dtype=torch.float64)
    activation = "sigmoid" if kind == "sigmoid" else "softmax"
    fused = mk.linear_mixupe_loss(hidden, weight, target, bias=bias, eta=0.4, activation=activation, chunk_rows=4)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(fused, mk.mixupe_loss(logits, target, eta=0.4, activation=activation))


def test_autocast():
    hidden, weight, bias, target = problem(torch.float32, features=64)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = mk.linear_mixupe_loss(hidden, weight, target, bias=bias, eta=0.4, chunk_rows=3)
        unfused = mk.mixupe_loss(torch.nn.functional.linear(*inputs), target, eta=0.4)
    torch.testing.assert_close(fused, unfused)
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs) for loss in (fused, unfused)), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)  # bfloat16 sums in another order


def test_empty_batch():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = mk.linear_mixupe_loss(hidden, weight, labels, eta=0.4)
    loss.backward()
    assert loss == 0 and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("with_bias", [True, False])
def test_second_derivatives_are_those_of_the_unfused_form(with_bias):
    hidden, weight, bias, target = problem()
    inputs = [tensor.requires_grad_() for tensor in ((hidden, weight, bias) if with_bias else (hidden, weight))]
    options = {"eta": 0.4, "clean_weight": 0.6}
    found = []
    for loss in (
        mk.linear_mixupe_loss(hidden, weight, target, bias=bias if with_bias else None, chunk_rows=3, **options),
        mk.mixupe_loss(torch.nn.functional.linear(*inputs), target, **options),
    ):
        first = torch.autograd.grad(3 * loss, inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((part**2).sum() for part in first), inputs))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_of_the_gradient_does_not_change_it_where_the_weight_is_shared():
    hidden, weight, bias, target = problem()
    weight.requires_grad_()
    found = []
    for create_graph in (False, True):
        loss = mk.linear_mixupe_loss(hidden * weight[:1].tanh(), weight, target, bias=bias, eta=0.4)
        found.append(torch.autograd.grad(loss, weight, create_graph=create_graph)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_is_handed_out_once(dtype):
    hidden, weight, bias, target = problem(dtype)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    loss = mk.linear_mixupe_loss(hidden, weight, target, bias=bias, eta=0.4, chunk_rows=3)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    expected = [part.clone() for part in first]
    for part in first:
        part.zero_()
    for again, kept in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert kept.abs().max() > 0 and torch.equal(again, kept)


def test_a_loss_scaler_keeps_float16_gradients():
    """A row's share of the gradient is 2^-16 at most: without the scaler's factor float16 would keep eight bits of it."""
    torch.manual_seed(0)
    rows, scale = 2**16, 2.0**16
    hidden, weight = torch.randn(rows, 8).half().requires_grad_(), torch.randn(7, 8).half()
    labels = torch.randint(7, (rows,))
    loss = mk.linear_mixupe_loss(hidden, weight, labels, eta=0.0, chunk_rows=9999)
    wide = hidden.detach().double().requires_grad_()
    expected = mk.mixupe_loss(wide @ weight.double().t(), labels, eta=0.0)
    (ours,), (theirs,) = torch.autograd.grad(loss * scale, hidden), torch.autograd.grad(expected * scale, wide)
    assert ours.dtype == torch.float16
    assert (ours.double() - theirs).norm() < 2e-3 * theirs.norm()


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, bias, target = problem()
    hidden.requires_grad_()
    with torch.no_grad():
        quiet = peak_bytes(lambda: mk.linear_mixupe_loss(hidden, weight, target, bias=bias, eta=0.4, chunk_rows=3))
    loud = peak_bytes(lambda: mk.linear_mixupe_loss(hidden, weight, target, bias=bias, eta=0.4, chunk_rows=3))
    assert quiet < loud
    (gradient,) = torch.autograd.grad(mk.linear_mixupe_loss(hidden, weight, target, eta=0.4), hidden)
    assert gradient.shape == hidden.shape


def peak_bytes(call):
    """The most bytes of tensors that ``call`` holds at once beyond what was there, as the profiler sees them come and go."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_peak_memory_is_a_chunk():
    rows, classes, chunk_rows = 512, 8192, 32
    hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(classes, 16, requires_grad=True)
    labels = torch.randint(classes, (rows,))

    def fused():
        mk.linear_mixupe_loss(hidden, weight, labels, eta=0.1, chunk_rows=chunk_rows).backward()

    def unfused():
        mk.mixupe_loss(hidden @ weight.t(), labels, eta=0.1).backward()

    with mk.use_backend("cpp" if "cpp" in mk.available_backends() else "reference"):
        unfused_peak, fused_peak = peak_bytes(unfused), peak_bytes(fused)
    logits, chunk, gradients = rows * classes * 4, chunk_rows * classes * 4, (rows + classes) * 16 * 4
    assert unfused_peak > 1.9 * logits  # the logits and their gradient
    if "cpp" in mk.available_backends():  # plain PyTorch has temporaries of a chunk's size
        # A chunk, which its gradient replaces, and the gradients.
        assert fused_peak < chunk + gradients + 128 * 1024
    assert fused_peak < unfused_peak / 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.zeros(7, 5)}, ValueError, r"must share D, got \(10, 6\) and \(7, 5\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(7,\), got \(6,\)"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be an int >= 1, got 0"),
        ({"penalty": torch.abs}, ValueError, "penalty must be one of"),
        ({"eta": -1}, ValueError, "eta must be a number >= 0, got -1"),
    ],
)
def test_bad_input(change, error, message):
    hidden, weight, bias, target = problem(torch.float32)
    with pytest.raises(error, match=message):
        mk.linear_mixupe_loss(
            **{"hidden": hidden, "weight": weight, "target": target, "bias": bias, "eta": 0.1, **change}
        )
