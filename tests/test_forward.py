"""forward_mixupe: one call and two agree where rows are separate, and differ as documented under BatchNorm."""

import copy

import pytest
import torch
from torch import nn

import mixupe_kernels as mk


def batch(**options):
    x, labels = torch.randn(24, 6, dtype=torch.float64), torch.randint(5, (24,))
    return mk.MixupE(alpha=1.0, **options)(x, labels)


def gradients(model, x, target, batched):
    model.zero_grad()
    mk.MixupELoss(eta=0.5)(mk.forward_mixupe(model, x, target, batched=batched), target).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"clean_fraction": 1 / 3}, {"clean_fraction": 1 / 4, "split": True}])
def test_same_where_rows_are_separate(options):
    model = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 5)).double()
    x, target = batch(**options)
    one, two = (mk.forward_mixupe(model, x, target, batched=batched) for batched in (True, False))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(gradients(model, x, target, True), gradients(model, x, target, False))


@pytest.mark.parametrize("batched", [True, False])
def test_batchnorm_normalises_and_tracks_as_documented(batched):
    momentum = 0.3
    norm = nn.BatchNorm1d(6, momentum=momentum, affine=False).double()
    x, target = batch(clean_fraction=1 / 3)
    logits = mk.forward_mixupe(norm, x, target, batched=batched)
    parts = [x] if batched else [x[: target.num_mixed], x[target.num_mixed :]]
    mean, variance, expected = torch.zeros(6).double(), torch.ones(6).double(), []
    for rows in parts:
        mean = (1 - momentum) * mean + momentum * rows.mean(0)
        variance = (1 - momentum) * variance + momentum * rows.var(0)
        expected.append((rows - rows.mean(0)) / (rows.var(0, unbiased=False) + norm.eps).sqrt())
    torch.testing.assert_close(logits, torch.cat(expected))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == len(parts)


def test_running_variance_is_larger_in_two_calls():
    # Features of variance 1: λ = 1/2 halves the mixed rows', and the clean rows enter last, so with more weight.
    one = nn.BatchNorm1d(6).double()
    two = copy.deepcopy(one)
    mixer = mk.MixupE(alpha=1000.0, clean_fraction=1 / 8)
    for _ in range(60):
        x, target = mixer(torch.randn(256, 6, dtype=torch.float64), torch.randint(5, (256,)))
        mk.forward_mixupe(one, x, target)
        mk.forward_mixupe(two, x, target, batched=False)
    assert 0.5 < one.running_var.mean() < 0.62  # (256·½ + 32·1) / 288 = 0.56
    assert 0.7 < two.running_var.mean() < 0.82  # (0.9·½ + 1) / 1.9 = 0.76


def test_rows_of_one_kind_are_one_call():
    calls = []
    x, target = batch(regularize="mixed")
    mk.forward_mixupe(lambda rows: calls.append(len(rows)) or rows, x, target, batched=False)
    assert calls == [24]


def test_bad_arguments():
    x, target = batch()
    with pytest.raises(ValueError, match="x must have shape"):
        mk.forward_mixupe(nn.Identity(), x[1:], target)
    with pytest.raises(TypeError, match="target must be a MixedTarget, got Tensor"):
        mk.forward_mixupe(nn.Identity(), x, target.labels)
