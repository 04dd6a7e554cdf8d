"""Inputs and comparisons for operator tests, for any backend and device."""

import torch

from mixupe_kernels import conventions

# (rows, classes): one class, two, odd, a multiple of every vector width, past one block of a backend's loop.
SHAPES = [(0, 5), (1, 1), (4, 2), (3, 7), (17, 33), (6, 1000), (2, 21841)]
TARGETS = ["index", "mixed", "dense"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def compute_dtype(dtype):
    return conventions.accumulate_dtype(dtype)


def make_logits(shape, dtype, layout="contiguous", device="cpu", scale=4.0):
    rows, classes = shape
    if layout == "contiguous":
        z = torch.randn(rows, classes, device=device) * scale
        return z.to(dtype)
    if layout == "sliced":  # rows of a wider tensor: the row stride is not C, and rows are unaligned
        return (torch.randn(rows, classes + 3, device=device) * scale).to(dtype)[:, 1 : classes + 1]
    if layout == "strided":  # every other row
        return (torch.randn(2 * rows, classes, device=device) * scale).to(dtype)[::2]
    assert layout == "transposed"  # the last dimension is not contiguous
    return (torch.randn(classes, rows, device=device) * scale).to(dtype).t()


def make_target(kind, shape, dtype, device="cpu"):
    """(target, partner, lam) as the operators take them; λ takes the values 0 and 1, and some partners are the label."""
    rows, classes = shape
    compute = compute_dtype(dtype)
    if kind == "dense":
        return (torch.rand(rows, classes, device=device).softmax(1).to(compute), None, None)
    labels = torch.randint(classes, (rows,), device=device)
    if kind == "index":
        return (labels, None, None)
    partner = torch.randint(classes, (rows,), device=device)
    partner[::3] = labels[::3]
    lam = torch.rand(rows, device=device, dtype=compute)
    lam[1::4], lam[2::4] = 0, 1
    return (labels, partner, lam)


def to_double(values):
    """The same arguments with every floating-point tensor in float64."""
    return tuple(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)


def assert_accurate(actual, truth, peer, factor=4.0, ulps=4.0, floor=0.0):
    """|actual - truth| may be ``factor`` times the error of ``peer``, which is PyTorch in the same dtype, plus a few ulps
    of the largest value (or of ``floor``, if that is larger); infinities and NaN must be where the truth has them."""
    assert actual.shape == truth.shape and actual.dtype == peer.dtype
    # In float64 the truth is itself an order of summation, no better than another: allow what sums of 21841 terms lose.
    eps = torch.finfo(actual.dtype).eps * (32 if actual.dtype == torch.float64 else 1)
    actual, peer, finite = actual.double(), peer.double(), truth.isfinite()
    assert torch.equal(actual.isnan(), truth.isnan()), "NaN where there should be none, or the reverse"
    assert torch.equal(actual[truth.isinf()], truth[truth.isinf()])
    if not bool(finite.any()):
        return
    error, peer_error = ((x - truth)[finite].abs().max() for x in (actual, peer))
    bound = factor * peer_error + ulps * eps * truth[finite].abs().max().clamp(min=floor)
    assert error <= bound, f"error {error:.3g}, PyTorch's own {peer_error:.3g}, bound {bound:.3g}"
