"""mixed_target: what a batch's draw comes to, row by row."""

import pytest
import torch

ops = torch.ops.mixupe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_mixed_target(backend, flip, per_sample, dtype):
    labels, pairs = torch.randint(100, (9,)), None if flip else torch.randint(9, (9,))
    lam = torch.rand(9 if per_sample else (), dtype=dtype)
    some = torch.randint(9, (300,))
    for rows, num_mixed in (
        (torch.randperm(9), 5),
        (torch.arange(9).repeat(2), 9),
        (some, 0),
        (some, 300),
        (some[:0], 0),
    ):
        found = ops.mixed_target(labels, pairs, lam, rows, num_mixed)
        expected = []
        for position, own in enumerate(rows.tolist()):
            partner = 8 - own if flip else int(pairs[own])
            weight = float(lam[own] if per_sample else lam)
            partner, weight = (partner, weight) if position < num_mixed else (own, 1.0)
            expected.append((weight, partner, int(labels[own]), int(labels[partner])))
        assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
        assert [part.dtype for part in found] == [dtype] + [torch.int64] * 3


def test_mixed_target_gives_lam_its_gradient(backend):
    labels, rows = torch.arange(4), torch.tensor([2, 0, 2, 1, 3])
    for size in ((), (4,)):
        lam = torch.rand(size, dtype=torch.float64, requires_grad=True)

        def function(lam):
            return ops.mixed_target(labels, None, lam, rows, 3)[0]

        assert torch.autograd.gradcheck(function, lam) and torch.autograd.gradgradcheck(function, lam)


@pytest.mark.refuses
@pytest.mark.parametrize("rows, partner", [([0, 4], [0, 1, 2, 3]), ([0, -1], [0, 1, 2, 3]), ([0, 1], [0, 1, 2, -1])])
def test_mixed_target_refuses_rows_out_of_range(backend, rows, partner):
    arguments = (torch.arange(4), torch.tensor(partner), torch.tensor(0.5), torch.tensor(rows), 1)
    with pytest.raises((ValueError, RuntimeError), match=r"(rows|partner) must be in \[0, 3\], got (4|-1)"):
        ops.mixed_target(*arguments)
