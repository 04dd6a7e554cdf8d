"""Classifier and loss fused: the value and gradients of the two apart, in the memory of a chunk."""

import subprocess
import sys

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
    options = {"eta": 0.4, "penalty": penalty, "label_smoothing": 0.1}
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


def test_second_derivative_is_refused():
    hidden, weight, bias, target = problem()
    loss = mk.linear_mixupe_loss(hidden.requires_grad_(), weight, target, bias=bias, eta=0.4)
    with pytest.raises(RuntimeError, match="linear_mixupe_loss is differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


MEMORY_PROBE = """
import re, sys, torch, mixupe_kernels as mk
torch.set_num_threads(1)
fused, rows, classes, chunk = sys.argv[1] == "fused", 2048, 32768, 64
hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(classes, 16, requires_grad=True)
labels = torch.randint(classes, (rows,))
def step(n, classes):
    w = weight[:classes]
    if fused:
        loss = mk.linear_mixupe_loss(hidden[:n], w, labels[:n] % classes, eta=0.1, chunk_rows=chunk)
    else:
        loss = mk.mixupe_loss(hidden[:n] @ w.t(), labels[:n] % classes, eta=0.1)
    loss.backward()
    hidden.grad = weight.grad = None
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
step(8, 16)  # code and thread pools that any step needs
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here: proc(5)
before = peak()
step(rows, classes)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_a_chunk():
    peaks = {}
    for form in ("fused", "unfused"):
        run = subprocess.run([sys.executable, "-c", MEMORY_PROBE, form], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks[form] = int(run.stdout)
    logits, chunk, gradients = 2048 * 32768 * 4, 64 * 32768 * 4, 2 * (2048 + 32768) * 16 * 4
    assert peaks["unfused"] > 1.9 * logits  # the logits and their gradient
    assert peaks["fused"] < 2 * chunk + gradients + 16 * 2**20  # 16 MiB for the matrix product's own buffers


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
