"""normalise_apart and its backward: statistics of each kind of rows, in every dtype and order of memory."""

import pytest
import torch

from ..cases import DTYPES, Computed, assert_accurate, compute, compute_dtype, peer, thorough, truth

ops = torch.ops.mixupe
pytestmark = pytest.mark.by_torch

# One value a channel, fewer channels than a pack of lanes, some more, runs of one pack and some more.
SHAPES = [(5, 3), (9, 16), (7, 19), (6, 5, 4), (5, 3, 4, 4), (4, 20, 5, 7), (3, 2, 2, 3, 3), *thorough((6, 130, 9, 9))]


def channels_last(x):
    return x.contiguous(
        memory_format={4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    )


ORDERS = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[..., :1].expand_as(x) if x.dim() > 2 else x,
}


def arguments(shape, dtype, affine=True):
    x, compute = torch.randn(shape).mul(3).add(5).to(dtype), compute_dtype(dtype)
    weight, bias = (torch.randn(shape[1], dtype=compute) if affine else None for _ in range(2))
    return x, weight, bias, shape[0] // 2, 0.3, 1e-5


def forward(call, x, *rest):
    """The operator's results and the running statistics after it, by ``call(name, ...)``, which may compute in float64."""
    dtype = torch.float64 if call is truth else compute_dtype(x.dtype)
    running = [torch.full(x.shape[1:2], value, dtype=dtype) for value in (2.0, 3.0)]
    named = {"running_mean": running[0], "running_var": running[1]}
    return *call("normalise_apart", x, *rest, **named), *running


def here(name, *args, **named):
    return getattr(ops, name)(*args, **named)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_statistics_and_gradients(backend, shape, dtype, order):
    x, *rest = arguments(shape, dtype, affine=order != "transposed")
    x, grad = ORDERS[order](x), torch.randn(shape).to(dtype)
    results = [
        Computed(*values) for values in zip(*(forward(call, x, *rest) for call in (here, truth, peer)), strict=True)
    ]
    for result in results:
        assert_accurate(*result)
    weight, mean, inverse_std = rest[0], *results[1:3]
    for result in compute("normalise_apart_backward", grad, x, weight, mean, inverse_std, rest[2]):
        # Sums of gradients cancel: as many roundings as PyTorch may have made of one of their terms.
        assert_accurate(*result, floor=float(grad.abs().max()))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_mean_far_from_zero(backend, offset):
    x = torch.randn(40, 3, 8, 8) + offset
    for call in (ORDERS["contiguous"], ORDERS["channels last"]):
        args = call(x), None, None, 30, 0.1, 1e-5
        for result in zip(*(forward(which, *args) for which in (here, truth, peer)), strict=True):
            assert_accurate(*result)


def test_a_nan_stays_in_its_channel_and_kind(backend):
    x = torch.randn(8, 3, 4)
    x[6, 1, 2] = torch.nan
    out, mean, inverse_std, *running = forward(here, x, None, None, 5, 0.1, 1e-5)
    expected = torch.zeros(8, 3, dtype=torch.bool)
    expected[5:, 1] = True
    assert torch.equal(out.isnan().all(2), expected) and torch.equal(out.isnan().any(2), expected)
    for statistics in (mean[1], inverse_std[1], *running):
        assert statistics.isnan().tolist() == [False, True, False]


def test_bits_do_not_depend_on_threads(backend):
    args = arguments((64, 24, 12, 12), torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, mean, inverse_std, *running = forward(here, *args)
        found = ops.normalise_apart_backward(out.cos(), args[0], args[1], mean, inverse_std, args[3])
        results.append([out, mean, inverse_std, *running, *found])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def good():
    x, weight, bias, num_mixed, *_ = arguments((6, 3, 2), torch.float32)
    return {"x": x, "weight": weight, "bias": bias, "num_mixed": num_mixed, "grad": torch.randn(6, 3, 2)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(6, 3, 2, dtype=torch.int64)}, "x must have dtype float32, .*got int64"),
        ({"x": torch.zeros(6)}, r"x must have shape \(N, C, ...\), got \(6,\)"),
        ({"x": torch.zeros(6, 3, 0)}, r"x must have at least one value, got shape \(6, 3, 0\)"),
        ({"num_mixed": 0}, r"num_mixed must be in \[1, 5\], got 0"),
        ({"num_mixed": 6}, r"num_mixed must be in \[1, 5\], got 6"),
        ({"weight": torch.zeros(2)}, r"weight must have shape \(3,\), got \(2,\)"),
        ({"weight": torch.zeros(3).double()}, "weight must have dtype float32, got float64"),
    ],
)
def test_refused(backend, change, message):
    values = {**good(), **change}
    x, weight, bias, num_mixed, grad = values.values()
    kept = torch.full((3,), 7.0)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        ops.normalise_apart(x, weight, bias, num_mixed, 0.1, 1e-5, running_mean=kept, running_var=kept.clone())
    assert torch.equal(kept, torch.full((3,), 7.0))
    statistics = torch.ones(2, 3)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        ops.normalise_apart_backward(grad, x, weight, statistics, statistics, num_mixed)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bias": torch.zeros(2)}, r"bias must have shape \(3,\), got \(2,\)"),
        ({"running_mean": torch.zeros(4)}, r"running_mean must have shape \(3,\), got \(4,\)"),
        ({"running_var": torch.zeros(3).double()}, "running_var must have dtype float32, got float64"),
    ],
)
def test_refused_by_the_forward(backend, change, message):
    x, weight, bias, num_mixed, _ = {**good()}.values()
    values = {"bias": bias, "running_mean": torch.full((3,), 7.0), "running_var": torch.ones(3), **change}
    bias, mean, var = values.values()
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        ops.normalise_apart(x, weight, bias, num_mixed, 0.1, 1e-5, running_mean=mean, running_var=var)
    assert "running_mean" in change or torch.equal(mean, torch.full((3,), 7.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad": torch.zeros(6, 3)}, r"grad must have shape \(6, 3, 2\), got \(6, 3\)"),
        ({"grad": torch.zeros(6, 3, 2).double()}, "grad must have dtype float32, got float64"),
        ({"mean": torch.zeros(3)}, r"mean must have shape \(2, 3\), got \(3,\)"),
        ({"inverse_std": torch.zeros(2, 3).half()}, "inverse_std must have dtype float32, got float16"),
    ],
)
def test_refused_by_the_backward(backend, change, message):
    x, weight, _, num_mixed, grad = good().values()
    values = {"grad": grad, "mean": torch.zeros(2, 3), "inverse_std": torch.ones(2, 3), **change}
    grad, mean, inverse_std = values.values()
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        ops.normalise_apart_backward(grad, x, weight, mean, inverse_std, num_mixed)
