"""Accuracy on mixed and clean rows."""

import pytest
import torch

import mixupe_kernels as mk


def test_mixed_accuracy_is_the_definition():
    logits = torch.randn(20, 6)
    labels, partner, lam = torch.randint(6, (20,)), torch.randint(6, (20,)), torch.rand(20)
    labels[12:] = partner[12:]
    target = mk.MixedTarget(labels, partner, lam, 12, 8, 0.3)
    actual = mk.mixed_accuracy(logits, target, topk=(1, 3))
    for position, k in enumerate((1, 3)):
        found = [set(row.argsort(descending=True)[:k].tolist()) for row in logits]
        mixed = [
            lam[i] * (labels[i].item() in found[i]) + (1 - lam[i]) * (partner[i].item() in found[i]) for i in range(12)
        ]
        clean = [float(labels[i].item() in found[i]) for i in range(12, 20)]
        torch.testing.assert_close(actual.mixed[position], sum(mixed) / 12)
        torch.testing.assert_close(actual.clean[position], torch.tensor(sum(clean) / 8))


def test_soft_labels_count_as_their_largest_class():
    logits, labels = torch.randn(9, 4), torch.randint(4, (9,))
    hard = mk.MixedTarget(labels, labels.roll(1), torch.rand(9), 9, 0, 0.0)
    soft = hard._replace(labels=torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.025)
    soft = soft._replace(partner_labels=soft.labels.roll(1, 0))
    assert torch.equal(mk.mixed_accuracy(logits, hard).mixed, mk.mixed_accuracy(logits, soft).mixed)
    assert mk.mixed_accuracy(logits, hard).clean.isnan().all()


@pytest.mark.parametrize(
    "topk, message", [((7,), "topk must be at most the 6 classes, got 7"), ((0,), "topk must be an int")]
)
def test_topk_is_checked(topk, message):
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        mk.mixed_accuracy(torch.zeros(4, 6), mk.MixedTarget(labels, labels, torch.ones(4), 4, 0, 0.0), topk)


def test_target_is_checked():
    with pytest.raises(TypeError, match="target must be a MixedTarget, got Tensor"):
        mk.mixed_accuracy(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
