"""timm's arguments and what they mean, without timm."""

import pytest
import torch
import torch.nn.functional as F

import mixupe_kernels as mk


def batch(count=8):
    return torch.rand(count, 3, 8, 8), torch.randint(10, (count,))


def test_the_loss_is_that_of_soft_targets():
    mixup_fn, criterion = mk.like_timm(mixup_alpha=0.8, label_smoothing=0.1, num_classes=10)
    x, labels = batch()
    mixed, target = mixup_fn(x, labels)
    logits = torch.randn(8, 10, dtype=torch.float64)
    soft = target.dense(10, label_smoothing=0.1).double()
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(criterion(logits, target), expected, rtol=1e-6, atol=0)
    lam = target.lam[0]
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.flip(0))


@pytest.mark.parametrize(("mode", "least", "most"), [("batch", 1, 1), ("elem", 5, 8), ("pair", 2, 4)])
def test_modes(mode, least, most):
    for options in ({}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, {"cutmix_minmax": (0.2, 0.8)}):
        mixup_fn, _ = mk.like_timm(mode=mode, num_classes=10, **options)
        assert least <= max(len(mixup_fn(*batch())[1].lam.unique()) for _ in range(8)) <= most


def test_only_boxes():
    mixup_fn, _ = mk.like_timm(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=10)
    x, labels = batch()
    for _ in range(4):
        mixed, _ = mixup_fn(x, labels)
        assert bool(((mixed == x) | (mixed == x.flip(0))).all())


def test_clean_rows():
    mixup_fn, criterion = mk.like_timm(0.8, num_classes=10, clean_fraction=1 / 2, off_epoch=3)
    assert (
        criterion.eta == 1e-3 and criterion.clean_weight == 1 / 2 and criterion.options.of_loss.label_smoothing == 0.1
    )
    _, target = mixup_fn(*batch())
    assert target.num_mixed == 8 and target.num_rows == 16
    mixup_fn.set_epoch(3)
    assert mixup_fn(*batch())[1].num_rows == 8
    _, criterion = mk.like_timm(clean_fraction=1 / 4, split=True)
    assert criterion.clean_weight == pytest.approx(1 / 3)


def test_the_switch_of_the_script():
    mixup_fn, criterion = mk.like_timm(num_classes=10, label_smoothing=0.0)
    mixup_fn.mixup_enabled = False
    x, labels = batch()
    same, target = mixup_fn(x, labels)
    logits = torch.randn(8, 10)
    torch.testing.assert_close(criterion(logits, target), F.cross_entropy(logits, labels))
    assert same is x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mixup_alpha": 0.0}, ValueError, "mixup_alpha must be > 0 where cutmix_alpha is 0"),
        ({"mode": "half"}, ValueError, "mode must be one of 'batch', 'elem', 'pair', got 'half'"),
        ({"eta": 1.0}, ValueError, "clean_fraction must be given with eta"),
        ({"cutmix_minmax": 0.5}, TypeError, "cutmix_minmax must be two numbers"),
        ({"cutmix_minmax": (0.9, 0.2)}, ValueError, r"cutmix_minmax must be \(smallest, largest\)"),
        ({"num_classes": 0}, ValueError, "num_classes must be an int >= 1"),
        ({"switch_prob": 2.0}, ValueError, r"switch_prob must be a number in \[0, 1\], got 2.0"),
        ({"cutmix_alpha": -1.0, "cutmix_minmax": (0.2, 0.8)}, ValueError, "cutmix_alpha must be a number >= 0, got -1"),
        ({"correct_lam": 1, "cutmix_alpha": 1.0}, TypeError, "correct_lam must be True or False"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        mk.like_timm(**options)
