"""torchvision: v2.MixUp and v2.CutMix, given the same λ, partner and box; its models and its collate function."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

import mixupe_kernels as mk
from mixupe_kernels.batch.plan import Draw

from . import library

v2 = library("torchvision.transforms.v2")
CLASSES = 10


def batch(count=8, size=16):
    return torch.rand(count, 3, size, size), torch.randperm(CLASSES)[:count]


def test_mixup_of_the_same_lam():
    x, labels = batch()
    expected, dense = v2.MixUp(alpha=0.8, num_classes=CLASSES)(x, labels)
    lam = dense.gather(1, labels.view(-1, 1)).squeeze(1)
    assert 0 < lam[0] < 1
    partner = mk.pairing.roll(8, None, torch.device("cpu"))
    target = mk.MixedTarget(labels, labels[partner], lam, 8, 0, 0.0)
    mixup_fn = mk.Mixup(0.8, pairing="roll")
    torch.testing.assert_close(mixup_fn.apply(Draw(8, partner, lam, target), x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target.dense(CLASSES), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_of_the_same_box(seed):
    torch.manual_seed(seed)
    x, labels = batch()
    expected, dense = v2.CutMix(alpha=1.0, num_classes=CLASSES)(x, labels)
    cut = (expected != x).any(1)[0]
    down, across = cut.any(1).nonzero().flatten(), cut.any(0).nonzero().flatten()
    box = torch.zeros(4, dtype=torch.int64)
    if len(down):
        box = torch.tensor([int(down[0]), int(down[-1]) + 1, int(across[0]), int(across[-1]) + 1])
    lam = (1 - (box[1] - box[0]) * (box[3] - box[2]) / 256).float()
    partner = mk.pairing.roll(8, None, torch.device("cpu"))
    target = mk.MixedTarget(labels, labels[partner], lam.expand(8), 8, 0, 0.0)
    mixup_fn = mk.Mixup(pairing="roll", cutmix_alpha=1.0)
    rows = mixup_fn.apply(Draw(8, partner, torch.ones(()), target, box=box), x)
    assert torch.equal(rows, expected)
    torch.testing.assert_close(target.dense(CLASSES), dense, rtol=1e-5, atol=1e-6)


def test_boxes_are_drawn_by_the_same_law():
    """The share that stays, over many batches, within 4.5 standard errors."""
    x, labels = torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])
    theirs, ours = v2.CutMix(alpha=1.0, num_classes=2), mk.Mixup(cutmix_alpha=1.0, switch_prob=1.0, pairing="roll")
    expected = torch.stack([theirs(x, labels)[1][0, 0] for _ in range(3000)]).double()
    drawn = torch.stack([ours(x, labels)[1].lam[0] for _ in range(3000)]).double()
    for power in (1, 2):
        one, other = drawn**power, expected**power
        error = ((one.var() + other.var()) / 3000) ** 0.5
        assert abs(one.mean() - other.mean()) < 4.5 * error


@pytest.mark.parametrize("workers", [0, 2])
def test_in_the_collate_function(workers):
    data = TensorDataset(*batch())
    loader = DataLoader(data, 4, collate_fn=mk.Collate(mk.MixupE(pairing="roll")), num_workers=workers)
    assert all(len(x) == target.num_rows == 8 for x, target in loader)
    assert default_collate([data[0]])[0].shape == (1, 3, 16, 16)


def test_typed_tensors_and_masks():
    from torchvision import tv_tensors

    x, labels = batch()
    image, mask = tv_tensors.Image(x), torch.randint(5, (8, 16, 16))
    mixed, target = mk.Mixup(cutmix_alpha=1.0)(image, labels)
    assert mixed.shape == x.shape and target.num_rows == 8
    _, target = mk.Mixup(cutmix_alpha=1.0)(image, tv_tensors.Mask(mask))
    assert target.labels.shape == (8, 16, 16)


def test_a_model_with_its_batch_norm():
    models = library("torchvision.models")
    model = mk.split_batch_norm(models.resnet18(num_classes=CLASSES))
    x, target = mk.MixupE(clean_fraction=1 / 2)(*batch(size=32))
    mk.MixupELoss()(mk.forward_mixupe(model, x, target), target).backward()
    assert all(p.grad is not None for p in model.parameters())
