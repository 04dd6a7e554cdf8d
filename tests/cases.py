"""Inputs and comparisons for operator tests, for any backend and device."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mixupe_kernels as mk
from mixupe_kernels import conventions

TARGETS = ["index", "mixed", "dense"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "sliced", "strided", "transposed"]


def thorough(*values):
    """Parameters that only fast backends are tested with: conftest.py takes them from the slow ones."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


# (rows, classes): one class, two, odd, a multiple of every vector width, past one block of a backend's loop.
SHAPES = [(0, 5), (1, 1), (4, 2), (3, 7), (17, 33), (6, 1000), *thorough((2, 21841))]


def compute_dtype(dtype):
    return conventions.accumulate_dtype(dtype)


def make_logits(shape, dtype, layout="contiguous", scale=4.0):
    rows, classes = shape
    if layout == "contiguous":
        return (torch.randn(rows, classes) * scale).to(dtype)
    if layout == "sliced":  # rows of a wider tensor: the row stride is not C, and rows are unaligned
        return (torch.randn(rows, classes + 3) * scale).to(dtype)[:, 1 : classes + 1]
    if layout == "strided":  # every other row
        return (torch.randn(2 * rows, classes) * scale).to(dtype)[::2]
    assert layout == "transposed"  # the last dimension is not contiguous
    return (torch.randn(classes, rows) * scale).to(dtype).t()


def make_target(kind, shape, dtype):
    """(labels, partner_labels, lam) as the operators take them; λ takes the values 0 and 1, and some labels are equal."""
    rows, classes = shape
    if kind == "dense":
        return (torch.rand(rows, classes).softmax(1).to(compute_dtype(dtype)), None, None)
    labels = torch.randint(classes, (rows,))
    if kind == "index":
        return (labels, None, None)
    partner_labels = torch.randint(classes, (rows,))
    partner_labels[::3] = labels[::3]
    lam = torch.rand(rows, dtype=compute_dtype(dtype))
    lam[1::4], lam[2::4] = 0, 1
    return (labels, partner_labels, lam)


class Computed(NamedTuple):
    """One result of an operator by the backend in use, by the reference in float64, and by the reference in its dtype."""

    actual: Tensor | None
    truth: Tensor | None
    peer: Tensor | None


def as_double(value):
    """The argument as the float64 call takes it; a dtype asked for is float64 too."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.uint8):
        return value.double()
    return None if isinstance(value, torch.dtype) else value


def truth(name, *args, **written):
    """``torch.ops.mixupe.<name>`` of the arguments in float64, by the reference: what every backend is compared with."""
    with mk.use_backend("reference"):
        return getattr(torch.ops.mixupe, name)(*map(as_double, args), **written)


def peer(name, *args, **written):
    """The same in the arguments' own dtypes: the error PyTorch makes there is what a backend's is compared with."""
    with mk.use_backend("reference"):
        return getattr(torch.ops.mixupe, name)(*args, **written)


def compute(name, *args):
    """The operator's result, or tuple of results, as ``Computed``; an argument may be ``Computed`` itself."""

    def of(which):
        return [value[which] if isinstance(value, Computed) else value for value in args]

    results = getattr(torch.ops.mixupe, name)(*of(0)), truth(name, *of(1)), peer(name, *of(2))
    if isinstance(results[0], tuple):
        return tuple(Computed(*values) for values in zip(*results, strict=True))
    return Computed(*results)


def check(name, *args, **tolerances):
    """``compute``, every result within the tolerances of ``assert_accurate``."""
    results = compute(name, *args)
    for result in (results,) if isinstance(results, Computed) else results:
        assert_accurate(*result, **tolerances)
    return results


def assert_accurate(actual, truth, peer, factor=4.0, ulps=4.0, floor=0.0):
    """|actual - truth| may be ``factor`` times the error of ``peer``, which is PyTorch in the same dtype, plus a few ulps
    of the largest value, and of ``floor`` in the dtype of the arithmetic; infinities and NaN must be where the truth has
    them."""
    assert actual.shape == truth.shape and actual.dtype == peer.dtype
    # In float64 the truth is itself an order of summation, no better than another: allow what sums of 21841 terms lose.
    eps = torch.finfo(actual.dtype).eps * (32 if actual.dtype == torch.float64 else 1)
    arithmetic = min(eps, torch.finfo(torch.float32).eps)
    actual, peer, finite = actual.double(), peer.double(), truth.isfinite()
    assert torch.equal(actual.isnan(), truth.isnan()), "NaN where there should be none, or the reverse"
    assert torch.equal(actual[truth.isinf()], truth[truth.isinf()])
    if not bool(finite.any()):
        return
    error, peer_error = ((x - truth)[finite].abs().max() for x in (actual, peer))
    bound = factor * peer_error + ulps * (eps * truth[finite].abs().max() + arithmetic * floor)
    assert error <= bound, f"error {error:.3g}, PyTorch's own {peer_error:.3g}, bound {bound:.3g}"
