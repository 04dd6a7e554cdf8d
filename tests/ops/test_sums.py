"""gather_sum and row_dot: what gradients of mixing are made of, and mixing of more than two samples."""

import pytest
import torch

from ..cases import DTYPES, check, compute_dtype, thorough

ops = torch.ops.mixupe


def many_to_one(rows, terms):
    """index, weight and offsets with empty, single and long segments."""
    index = torch.randint(rows, (terms,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(terms + 1, (rows,)).sort().values])
    offsets[-1] = terms
    return index, torch.randn(terms), offsets


SIZES = [(), (1,), (3, 5), (1031,), *thorough((40000,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather_sum_and_row_dot(backend, size, dtype):
    a, b = torch.randn(7, *size).to(dtype), torch.randn(4, *size).to(dtype)
    index, weight, offsets = many_to_one(7, 20)
    check("gather_sum", a, index, weight.to(compute_dtype(dtype)), offsets)
    # In float64 the truth has no more digits than what is compared with it: allow sums in another order.
    check("row_dot", a, b, index, torch.randint(4, (20,)), ulps=16 if dtype == torch.float64 else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_and_strided_images(backend, dtype):
    images = torch.randn(14, 3, 5, 7).to(dtype)
    index, weight, offsets = many_to_one(7, 20)
    for a in (images[::2], images[:7].contiguous(memory_format=torch.channels_last), images[:7].transpose(2, 3)):
        check("gather_sum", a, index, weight, offsets)
        check("row_dot", a, images[:7].view_as(a), index, index.flip(0))


def test_sums_of_nothing(backend):
    src, none = torch.randn(4, 9), torch.empty(0, dtype=torch.int64)
    zeros = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(ops.gather_sum(src, none, torch.empty(0), zeros), torch.zeros(2, 9))
    assert ops.gather_sum(src, none, torch.empty(0), zeros[:1]).shape == (0, 9)
    assert ops.row_dot(src, src, none, none).shape == (0,)


def test_sums_repeat_bit_for_bit(backend):
    a, index = torch.randn(5, 17000), torch.tensor([0, 1, 1, 2])
    assert torch.equal(*(ops.row_dot(a, a, index, index) for _ in range(2)))
    weight, offsets = torch.rand(4), torch.tensor([0, 3, 3, 4])
    assert torch.equal(*(ops.gather_sum(a, index, weight, offsets) for _ in range(2)))
