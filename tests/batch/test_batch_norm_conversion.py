"""split_batch_norm: what it changes of a model, which layers it refuses, and models without it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixupe_kernels as mk

from .networks import batch, images, network, statistics, step, target_of


def test_conversion_changes_the_class_and_nothing_else():
    model = network()
    names = list(model.state_dict())
    parameters, buffers = list(model.parameters()), list(model.buffers())
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert mk.split_batch_norm(model) is model and mk.split_batch_norm(model) is model
    assert list(model.state_dict()) == names
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert all(one is two for one, two in zip(model.buffers(), buffers, strict=True))
    assert isinstance(model[1], nn.BatchNorm2d) and repr(model[1]).startswith("SplitBatchNorm2d(8, eps=1e-05")
    before = model[1].weight.detach().clone()
    step(model, model, *images())
    optimizer.step()
    assert calls and not torch.equal(before, model[1].weight)


def test_state_dict_goes_both_ways():
    plain, split = network(), mk.split_batch_norm(network())
    step(split, split, *images())
    plain.load_state_dict(split.state_dict(), strict=True)
    torch.testing.assert_close(statistics(plain), statistics(split))
    plain(images()[0])
    split.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(statistics(plain), statistics(split))
    assert split.state_dict()._metadata == plain.state_dict()._metadata


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, saved, lambda model: pickle.loads(pickle.dumps(model, 0))]
)
def test_copies_are_converted(copied):
    model = mk.split_batch_norm(network())
    x, target = images()
    step(model, model, x, target)
    twin = copied(model)
    torch.testing.assert_close(mk.forward_mixupe(twin, x, target), mk.forward_mixupe(model, x, target))
    assert type(twin[1]) is type(model[1])
    with pytest.raises(RuntimeError, match="write forward_mixupe"):
        twin(x)


class Renamed(nn.BatchNorm2d):
    """A subclass that keeps its forward."""

    extra = 1


class Activated(nn.BatchNorm2d):
    """A subclass whose forward does more."""

    def forward(self, x):
        return F.relu(super().forward(x))


def test_subclass_that_keeps_its_forward():
    layer = mk.split_batch_norm(Renamed(3))
    assert isinstance(layer, Renamed) and layer.extra == 1
    x, target = torch.randn(8, 3, 2, 2), target_of(8, 5)
    expected = torch.cat([nn.BatchNorm2d(3)(x[:5]), nn.BatchNorm2d(3)(x[5:])])
    torch.testing.assert_close(mk.forward_mixupe(pickle.loads(pickle.dumps(layer)), x, target), expected)


@pytest.mark.parametrize(
    "layer, words",
    [
        (Activated(3), "'1', a .*Activated, whose forward is its own"),
    ],
)
def test_other_layers_are_refused_by_name(layer, words):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(TypeError, match=f"model must have layers that split_batch_norm can convert, got {words}"):
        mk.split_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_replaced_forward_is_refused():
    model = network()
    model[1].forward = model[1].forward
    with pytest.raises(
        TypeError, match="got '1', .* whose forward was replaced: convert the model before it is wrapped"
    ):
        mk.split_batch_norm(model)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        mk.split_batch_norm(network)


def test_lazy_layers():
    plain = network()
    lazy = copy.deepcopy(plain)
    lazy[1], lazy[3][1] = nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()
    mk.split_batch_norm(lazy), mk.split_batch_norm(plain)
    x, target = images()
    for _ in range(2):
        torch.testing.assert_close(mk.forward_mixupe(lazy, x, target), mk.forward_mixupe(plain, x, target))
    assert type(lazy[1]) is type(plain[1])


def test_timm_layers():
    timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    layer = timm_layers.BatchNormAct2d(3)
    x, target = torch.randn(8, 3, 2, 2), target_of(8, 5)
    expected = torch.cat([copy.deepcopy(layer)(x[:5]), copy.deepcopy(layer)(x[5:])])
    ours = mk.forward_mixupe(mk.split_batch_norm(layer), x, target)
    torch.testing.assert_close(ours, expected)
    assert ours.min() == 0  # its activation


# --- without the conversion -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "batched, convert", [(True, lambda model: model), (False, lambda model: model), (False, mk.split_batch_norm)]
)
def test_batchnorm_normalises_and_tracks_as_documented(batched, convert):
    momentum = 0.3
    norm = convert(nn.BatchNorm1d(6, momentum=momentum, affine=False).double())
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


@pytest.mark.parametrize("convert", [lambda model: model, mk.split_batch_norm])
def test_unbatched_is_the_authors_two_calls(convert):
    """One of the mixed rows, then one of the clean rows: logits, gradients and what BatchNorm keeps, to the bit."""
    model, (x, target) = network(), images()
    expected = copy.deepcopy(model)
    loss = mk.MixupELoss(eta=0.5, clean_weight=0.3)
    logits = mk.forward_mixupe(convert(model), x, target, batched=False)
    expected_logits = torch.cat([expected(x[: target.num_mixed]), expected(x[target.num_mixed :])])
    loss(logits, target).backward(), loss(expected_logits, target).backward()
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


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
    with pytest.raises(TypeError, match="target must be a MixedTarget or None, got Tensor"):
        mk.forward_mixupe(nn.Identity(), x, target.labels)
