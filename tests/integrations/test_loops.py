"""What README says of a loop with autocast, accumulation, averaged weights and checkpointing, in plain PyTorch."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import mixupe_kernels as mk


def network():
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
    return mk.split_batch_norm(nn.Sequential(*layers))


def batch(mixup_fn=None, count=16):
    torch.manual_seed(1)
    return (mixup_fn or mk.MixupE(clean_fraction=1 / 2))(torch.randn(count, 6), torch.randint(4, (count,)))


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


CRITERION = {"eta": 0.1, "clean_weight": 1 / 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler(dtype):
    """Mixer outside, model and criterion inside: a float32 loss, near the float32 model's, and a scaler's gradients."""
    model, (x, target), criterion = network(), batch(), mk.MixupELoss(**CRITERION)
    expected = criterion(mk.forward_mixupe(copy.deepcopy(model), x, target), target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype is torch.float16)
    with torch.autocast("cpu", dtype=dtype):
        logits = mk.forward_mixupe(model, x, target)
        assert logits.dtype is dtype
        loss = criterion(logits, target)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True) if new.grad.any())


def test_accumulation_divides_by_the_steps():
    """Of losses that are means over as many rows each, without η̂: the gradient of all their rows."""
    model = nn.Linear(6, 4)
    criterion = mk.MixupELoss(eta=0.1, clean_weight=1 / 2, rescale=False)
    parts = [batch(mk.MixupE(clean_fraction=1 / 2, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    for x, target in parts:
        (criterion(model(x), target) / 3).backward()
    mixed = [(x[: t.num_mixed], t.rows(0, t.num_mixed)) for x, t in parts]
    clean = [(x[t.num_mixed :], t.rows(t.num_mixed)) for x, t in parts]
    whole = torch.cat([x for x, _ in mixed + clean])
    target = mk.MixedTarget.cat([t for _, t in mixed + clean])
    twin = copy.deepcopy(model)
    twin.zero_grad()
    criterion(twin(whole), target).backward()
    for one, other in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(one, other)


def test_averaged_weights():
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), mk.MixupELoss(**CRITERION)
    for _ in range(4):
        x, target = batch()
        optimizer.zero_grad()
        criterion(mk.forward_mixupe(model, x, target), target).backward()
        optimizer.step()
        average.update_parameters(model)
    plain = [torch.randn(16, 6) for _ in range(3)]
    before = average.module[1].running_mean.clone()
    assert torch.isfinite(average.eval()(plain[0])).all() and before.any()
    update_bn(plain, average)  # under no_grad all rows are clean: nothing to tell
    assert not torch.equal(average.module[1].running_mean, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, (x, target), criterion = network(), batch(), mk.MixupELoss(**CRITERION)
    twin = copy.deepcopy(model)
    criterion(mk.forward_mixupe(twin, x, target), target).backward()
    x.requires_grad_(reentrant)
    run = lambda x: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    criterion(mk.forward_mixupe(run, x, target), target).backward()
    for one, other in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(one, other)
    for layer, other in ((model[1], twin[1]), (model[4], twin[4])):
        torch.testing.assert_close(layer.running_mean, other.running_mean)
        assert layer.num_batches_tracked == other.num_batches_tracked == 1
