"""Mistakes of a user's first hour: each is answered by a right result, or by an error that says what to write."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import mixupe_kernels as mk

from . import library

CLASSES = 4
INSTEAD = "Write MixupELoss.*mixed_accuracy.*clean_rows.*target.dense"


def batch():
    return torch.randn(16, 6), torch.randint(CLASSES, (16,))


def mixed():
    x, target = mk.MixupE(clean_fraction=1 / 2)(*batch())
    return x, torch.randn(target.num_rows, CLASSES, requires_grad=True), target


def test_validation_with_the_training_criterion_is_plain_cross_entropy():
    x, labels = batch()
    logits = torch.randn(16, CLASSES)
    criterion = mk.MixupELoss(eta=0.5, clean_weight=1 / 4)
    torch.testing.assert_close(criterion(logits, labels), F.cross_entropy(logits, labels))
    smoothed = mk.MixupELoss(label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(smoothed, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_a_loss_of_torch_on_a_mixed_target():
    _, logits, target = mixed()
    for loss in (torch.nn.CrossEntropyLoss(), F.cross_entropy, torch.nn.BCEWithLogitsLoss()):
        with pytest.raises((TypeError, AttributeError), match=INSTEAD):
            loss(logits, target)


def test_a_plain_metric_on_a_mixed_target():
    _, logits, target = mixed()
    with pytest.raises((TypeError, AttributeError), match=INSTEAD):
        logits.argmax(1).eq(target)
    with pytest.raises(AttributeError, match=INSTEAD):
        target.float()


@pytest.mark.parametrize("name", ["MulticlassAccuracy", "MulticlassF1Score", "MulticlassCalibrationError"])
def test_a_metric_of_torchmetrics_on_a_mixed_target(name):
    metric = getattr(library("torchmetrics").classification, name)(CLASSES)
    _, logits, target = mixed()
    with pytest.raises((TypeError, AttributeError), match=INSTEAD):
        metric.update(logits, target)
    metric.update(*mk.clean_rows(logits, target))
    assert metric.compute().isfinite()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixer_in_a_worker(workers):
    loader = DataLoader(
        TensorDataset(*batch()), 8, collate_fn=mk.Collate(mk.MixupE(clean_fraction=1 / 2)), num_workers=workers
    )
    lams = [float(target.lam[0]) for _ in range(2) for _, target in loader]
    assert len(set(lams)) == 4


def test_a_mixer_in_a_dataset():
    """One sample at a time has no partner: what comes out is the sample, with a target that says so."""
    x, labels = batch()
    one, target = mk.MixupE()(x[:1], labels[:1])
    assert torch.equal(one[:1], x[:1]) and target.labels[0] == target.partner_labels[0] == labels[0]
    with pytest.raises(TypeError, match="labels must be a torch.Tensor, got int"):
        mk.MixupE()(x[0], 3)


def test_a_forgotten_forward_mixupe():
    model = mk.split_batch_norm(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8)))
    x, _, target = mixed()
    with pytest.raises(RuntimeError, match=r"write forward_mixupe\(model, x, target\) instead of model\(x\)"):
        model(x)
    assert mk.forward_mixupe(model, x, target).shape == (24, 8)


def test_a_forgotten_eval():
    model = mk.split_batch_norm(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8)))
    with torch.no_grad():  # as in validation: all rows are clean
        model(batch()[0])
    model.eval()
    model(batch()[0])


def test_labels_in_place_of_the_target():
    x, labels = batch()
    _, target = mk.MixupE()(x, labels)
    with pytest.raises(ValueError, match=r"labels must .*\(32,\)|target must .*\(32,\)"):
        mk.MixupELoss()(torch.randn(32, CLASSES), labels)


def test_arguments_in_the_wrong_order():
    x, labels = batch()
    with pytest.raises((TypeError, ValueError), match="x must have dtype float32"):
        mk.MixupE()(labels, x)
    _, logits, target = mixed()
    with pytest.raises((TypeError, ValueError), match="logits must be a torch.Tensor, got MixedTarget"):
        mk.MixupELoss()(target, logits)
    with pytest.raises(TypeError, match="eta must be a number"):
        mk.MixupELoss(logits, target)


def test_labels_of_other_kinds():
    x, labels = batch()
    for wrong, said in (
        (labels.int(), "labels must have dtype int64"),
        (labels.tolist(), "labels must be a torch.Tensor, got list"),
        (labels.view(-1, 1), "int64"),
        (labels[:8], "labels must have one row for each of the 16 samples"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            rows, target = mk.MixupE()(x, wrong)
            mk.MixupELoss()(torch.randn(len(rows), CLASSES), target)


def test_a_target_that_was_sliced_tensor_by_tensor():
    """What dispatched batches of Accelerate do to a target that was mixed in the collate function."""
    _, logits, target = mixed()
    half = type(target)(*(value[:12] if isinstance(value, torch.Tensor) else value for value in target))
    with pytest.raises(ValueError, match=r"target.num_mixed must be in \[0, 12\], got 16.*mix after"):
        mk.MixupELoss()(logits[:12], half)
