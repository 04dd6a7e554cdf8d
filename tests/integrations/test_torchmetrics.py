"""Metrics: ours over mixed and plain targets, and those of torchmetrics on the clean rows."""

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels.loss.accuracy import right_and_weight
from tests.ranks import processes

from . import library

torchmetrics = library("torchmetrics")

CLASSES = 5


@pytest.fixture
def metrics():
    from mixupe_kernels.integrations import torchmetrics as ours

    return ours


def batches(count=4, **options):
    mixup_fn = mk.MixupE(clean_fraction=1 / 2, generator=torch.Generator().manual_seed(0), **options)
    for _ in range(count):
        _, target = mixup_fn(torch.randn(16, 3), torch.randint(CLASSES, (16,)))
        yield torch.randn(target.num_rows, CLASSES), target


@pytest.mark.parametrize("k", [1, 2])
def test_over_batches_it_is_the_mean_over_rows(metrics, k):
    metric = {rows: metrics.MixedAccuracy(k, rows) for rows in ("all", "mixed", "clean")}
    right = {"mixed": [], "clean": []}
    for logits, target in batches():
        parts = mk.mixed_accuracy(logits, target, k)
        for rows, one in metric.items():
            one.update(logits, target)
            if rows != "all":
                right[rows].append(getattr(parts, rows)[0])
    for rows in right:
        torch.testing.assert_close(metric[rows].compute(), torch.stack(right[rows]).mean())
    everything = torch.stack(right["mixed"]).mean() * 16 + torch.stack(right["clean"]).mean() * 8
    torch.testing.assert_close(metric["all"].compute(), everything / 24)


def test_plain_labels_are_clean_rows(metrics):
    logits, labels = torch.randn(40, CLASSES), torch.randint(CLASSES, (40,))
    labels[3] = -100
    theirs = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro", ignore_index=-100)
    for rows in ("all", "clean"):
        ours = metrics.MixedAccuracy(rows=rows)
        for part in (slice(25), slice(25, None)):
            ours.update(logits[part], labels[part])
        torch.testing.assert_close(ours.compute(), theirs(logits, labels))
    ours = metrics.MixedAccuracy(rows="mixed")
    ours.update(logits, labels)
    assert ours.compute().isnan()


def test_it_resets_copies_saves_and_collects(metrics):
    metric = metrics.MixedAccuracy()
    (first, target), (second, other) = batches(2)
    metric.update(first, target)
    alone = metric.compute().clone()
    twin = metric.clone()
    metric.update(second, other)
    metric.reset()
    metric.update(first, target)
    assert metric.compute() == alone == twin.compute()
    metric.persistent(True)
    loaded = metrics.MixedAccuracy()
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    assert loaded.right == metric.right
    collection = torchmetrics.MetricCollection(
        {"all": metrics.MixedAccuracy(), "clean": metrics.MixedAccuracy(rows="clean")}
    )
    collection.update(first, target)
    assert set(collection.compute()) == {"all", "clean"} and collection.compute()["all"] == alone


def case_processes():
    """Each rank has seen one of two batches; ``compute`` is of both, and each then has its own again."""
    from mixupe_kernels.integrations.torchmetrics import MixedAccuracy

    given = list(batches(2))
    both, own = MixedAccuracy(), MixedAccuracy()
    both.distributed_available_fn = lambda: False
    for logits, target in given:
        both.update(logits, target)
    rank = torch.distributed.get_rank()
    own.update(*given[rank])
    torch.testing.assert_close(own.compute(), both.compute())
    (right,), weight = right_and_weight(*given[rank])
    assert own.right == right.sum() and own.weight == weight.sum()


def test_two_processes(tmp_path):
    case = f"{__name__}:case_processes"
    assert processes.run([case], 2, tmp_path) == {case: "passed"}


def test_any_metric_on_the_clean_rows(metrics):
    theirs = torchmetrics.classification.MulticlassCalibrationError(CLASSES)
    expected = torchmetrics.classification.MulticlassCalibrationError(CLASSES)
    metric = metrics.OnCleanRows(theirs)
    for logits, target in batches():
        metric.update(logits, target)
        expected.update(logits[16:], target.labels[16:])
    torch.testing.assert_close(metric.compute(), expected.compute())
    metric.reset()
    logits, target = next(batches(interval=2))  # no clean rows
    assert target.num_rows == 16
    metric.update(logits, target)
    metric.update(logits, target.labels)
    expected.reset()
    expected.update(logits, target.labels)
    torch.testing.assert_close(metric.compute(), expected.compute())


def test_a_call_returns_the_batch_and_keeps_those_before(metrics):
    expected = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
    metric = metrics.OnCleanRows(torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro"))
    for logits, target in batches():
        assert metric(logits, target) == expected(logits[16:], target.labels[16:])
        assert metric.compute() == expected.compute()
    assert metric(*next(batches(interval=2))) is None  # no clean rows
    assert metric.compute() == expected.compute()


def test_clean_rows_are_views():
    logits, target = next(batches(1))
    clean, labels = mk.clean_rows(logits, target)
    assert torch.equal(clean, logits[16:]) and torch.equal(labels, target.labels[16:])
    assert clean.data_ptr() == logits[16:].data_ptr()
    with pytest.raises(TypeError, match="target must be a MixedTarget, got Tensor"):
        mk.clean_rows(logits, target.labels)
    with pytest.raises(ValueError, match=r"target.labels must have shape \(24,\)"):
        mk.clean_rows(logits, target._replace(labels=target.labels[1:]))


def test_arguments_are_checked(metrics):
    with pytest.raises(ValueError, match="rows must be one of 'all', 'mixed', 'clean', got 'some'"):
        metrics.MixedAccuracy(rows="some")
    with pytest.raises(TypeError, match="top_k must be an int"):
        metrics.MixedAccuracy(top_k="1")
    with pytest.raises(TypeError, match="target must be a MixedTarget"):
        metrics.MixedAccuracy().update(torch.zeros(4, 3), [0, 1, 2, 0])
