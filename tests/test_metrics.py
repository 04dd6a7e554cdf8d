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


def test_ignored_labels_are_no_errors():
    labels = torch.tensor([0, -100, 2, -100])
    logits = 9 * torch.nn.functional.one_hot(labels.clamp(min=0), 3).float()
    for rows in (slice(None), slice(1, 2)):
        target = mk.MixedTarget(labels[rows], labels[rows], torch.ones(len(labels[rows])), len(labels[rows]), 0, 0.0)
        mixed, _ = mk.mixed_accuracy(logits[rows], target)
        _, clean = mk.mixed_accuracy(logits[rows], target._replace(num_mixed=0))
        for value in (mixed, clean):
            assert value.isnan().all() if rows.stop else value.tolist() == [1]


@pytest.mark.parametrize("soft", [False, True])
def test_an_ignored_part_of_a_row_leaves_the_mean(soft):
    own, partner, lam = torch.tensor([0, -100, 1]), torch.tensor([1, 2, -100]), torch.tensor([0.25, 0.25, 0.25])
    logits = torch.tensor([[9.0, 1, 0], [0, 1, 9], [9, 1, 0]])  # right: own; partner; neither
    if soft:
        own, partner = (torch.nn.functional.one_hot(v + 101, 104)[:, 101:].float() for v in (own, partner))
    accuracy = mk.mixed_accuracy(logits, mk.MixedTarget(own, partner, lam, 3, 0, 0.0))
    torch.testing.assert_close(accuracy.mixed, torch.tensor([(0.25 + 0.75) / (1 + 0.75 + 0.25)]))


def test_topk_may_be_an_int():
    logits, labels = torch.randn(9, 4), torch.randint(4, (9,))
    target = mk.MixedTarget(labels, labels.roll(1), torch.rand(9), 5, 4, 0.0)
    for ours, expected in zip(
        mk.mixed_accuracy(logits, target, 2), mk.mixed_accuracy(logits, target, (2,)), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "topk, error, message",
    [
        ((7,), ValueError, "topk must be at most the 6 classes, got 7"),
        ((0,), ValueError, "topk must be an int"),
        ((), ValueError, "topk must have at least one k"),
        (True, TypeError, "topk must be an int"),
        ("1", TypeError, "topk must be an int"),
        (None, TypeError, "topk must be an int"),
    ],
)
def test_topk_is_checked(topk, error, message):
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=message):
        mk.mixed_accuracy(torch.zeros(4, 6), mk.MixedTarget(labels, labels, torch.ones(4), 4, 0, 0.0), topk)


def test_target_is_checked():
    with pytest.raises(TypeError, match="target must be a MixedTarget, got Tensor"):
        mk.mixed_accuracy(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.zeros(4, 5)}, r"target.labels must have shape \(4, 6\)"),
        ({"partner_labels": torch.zeros(3, dtype=torch.int64)}, r"target.partner_labels must have shape \(4,\)"),
        ({"lam": torch.ones(5)}, r"target.lam must have shape \(4,\)"),
        ({"num_mixed": 5}, r"target.num_mixed must be in \[0, 4\]"),
    ],
)
def test_parts_of_the_target_are_checked(change, message):
    labels = torch.zeros(4, dtype=torch.int64)
    target = mk.MixedTarget(labels, labels, torch.ones(4), 4, 0, 0.0)._replace(**change)
    with pytest.raises(ValueError, match=message):
        mk.mixed_accuracy(torch.zeros(4, 6), target)


def test_sequences_of_logits_are_refused_by_name():
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must have shape \(N, C\), got \(2, 3, 5\)"):
        mk.mixed_accuracy(torch.zeros(2, 3, 5), mk.MixedTarget(labels, labels, torch.ones(2), 2, 0, 0.0))
