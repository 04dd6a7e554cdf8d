"""A step on a device waits for nothing: no value is read back, nothing is copied from the host's memory.

Shown on the ``meta`` device, where every operation of the reference runs and none has values: what would read one is seen.
"""

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mixupe_kernels as mk
from mixupe_kernels import conventions, target

META = torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "aten.equal", "aten.item")


class Watch(TorchDispatchMode):
    """Notes operations that read values of a device's tensor or copy between the host and a device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = str(func), [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(read in name for read in READS) and any(not arg.is_cpu for arg in given):
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        if "copy" in name:
            devices = {arg.device for arg in [*given, result] if isinstance(arg, torch.Tensor)}
            if len(devices) > 1:
                self.found.append(f"{name} {[str(arg.device) for arg in given]}")
        return result


@pytest.fixture
def watched(monkeypatch):
    """A function that runs a step twice and returns what waited. Constants are made in the first step."""
    monkeypatch.setattr(conventions, "_tensors", {})
    monkeypatch.setattr(target, "_scalars", {})
    found = Watch()
    # What these make out of numbers for a device is copied from the host's memory.
    for maker in ("tensor", "as_tensor"):
        original = getattr(torch, maker)

        def noted(data: Any, *args, original=original, **kwargs):
            if kwargs.get("device", META) == META and torch.device(kwargs.get("device") or META) != torch.device("cpu"):
                found.found.append(f"{original.__name__}({data!r})")
            return original(data, *args, **kwargs)

        monkeypatch.setattr(torch, maker, noted)

    def twice(step):
        with META, found:
            step()
            step()
        return found.found

    return twice


def batch(dtype=torch.float32, soft=False):
    images = torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8) if dtype is torch.uint8 else torch.randn(8, 3, 6, 6)
    return images, torch.rand(8, 10) if soft else torch.randint(10, (8,))


def training_step(mixer, criterion=None, **kinds):
    with META:
        x, labels = batch(**kinds)
        weight = torch.randn(108, 10, requires_grad=True)
    criterion = criterion or mk.MixupELoss(eta=1e-2)

    def step():
        rows, target = mixer(x, labels)
        criterion(rows.flatten(1).to(weight.dtype) @ weight, target).backward()

    return step


ROWS = {
    "full": {},
    "sample": {"clean_fraction": 0.25},
    "split": {"clean_fraction": 0.25, "split": True},
    "mixed": {"regularize": "mixed"},
    "interval": {"interval": 2},
    "ramp": {"eta_ramp": mk.LinearRamp(0, 1, last_epoch=5)},
}
DRAWN = {
    "uniform": {"alpha": 1.0},
    "beta": {"alpha": 0.4},
    "small": {"alpha": 0.01},
    "ramp": {"alpha": mk.LinearRamp(0.1, 1, last_epoch=5)},
    "cutmix": {"alpha": 0.4, "cutmix_alpha": 1.0},
    "prob": {"prob": 0.5},
    "three samples": {"alpha": 0.4, "num_samples": 3, "num_classes": 10},
    **{
        law: {"lam_distribution": getattr(mk.sampling, law)(0.5)}
        for law in ("Beta", "HalfBeta", "DLambda", "WShaped", "Uniform", "Fixed")
    },
    "custom": {
        "lam_distribution": mk.sampling.Custom(lambda size, generator, device: torch.rand(size, device=device), 0.3)
    },
}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("rows, drawn", list(itertools.product(ROWS, DRAWN)))
def test_mixers_and_distributions(watched, rows, drawn, per_sample):
    assert watched(training_step(mk.MixupE(**ROWS[rows], **DRAWN[drawn], per_sample=per_sample))) == []


@pytest.mark.parametrize("pairing", mk.pairing.PAIRINGS)
@pytest.mark.parametrize("mixer", [mk.Mixup, mk.MixupE])
def test_pairings(watched, mixer, pairing):
    assert watched(training_step(mixer(pairing=pairing))) == []
    assert watched(training_step(mixer(pairing=pairing), soft=True)) == []


def test_epochs_and_neighbours(watched):
    mixer = mk.MixupE(alpha=mk.LinearRamp(0.2, 1, last_epoch=5), eta_ramp=mk.LinearRamp(0, 1, last_epoch=5))
    step, epochs = training_step(mixer), iter(range(1, 9))

    def next_epoch():
        mixer.set_epoch(next(epochs))
        step()

    assert watched(next_epoch) == []
    with META:
        neighbors = mk.pairing.Neighbors.__new__(mk.pairing.Neighbors)
        neighbors.index = torch.randint(8, (8, 2))
    assert watched(training_step(mk.MixupE(pairing=neighbors))) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)},
        {
            "mean": (0.1, 0.2, 0.3),
            "std": (1.0, 2.0, 3.0),
            "dtype": torch.bfloat16,
            "memory_format": torch.channels_last,
        },
    ],
)
def test_pixels(watched, options):
    assert watched(training_step(mk.MixupE(**options), dtype=torch.uint8)) == []


def losses():
    for penalty in (*conventions.PENALTIES, torch.abs):
        for options in ({}, {"rescale": False}, {"label_smoothing": 0.1}):
            yield {"penalty": penalty, **options}
    yield {"inplace_backward": True}


@pytest.mark.parametrize("options", list(losses()))
@pytest.mark.parametrize("soft", [False, True])
def test_losses(watched, options, soft):
    assert watched(training_step(mk.MixupE(), mk.MixupELoss(eta=0.1, **options), soft=soft)) == []


def test_a_sigmoid_loss(watched):
    assert watched(training_step(mk.MixupE(), mk.MixupELoss(eta=0.1, activation="sigmoid"), soft=True)) == []


with META:
    LOGITS, LABELS = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
    SAMPLES, PARTNER, LAM = (
        torch.randn(8, 5, requires_grad=True),
        torch.randint(8, (8,)),
        torch.rand(8, requires_grad=True),
    )
FUNCTIONS = {
    "mixupe_loss": lambda: mk.mixupe_loss(LOGITS, (LABELS, LABELS, 0.5), eta=0.3).backward(),
    "ce_entropy": lambda: mk.ce_entropy(LOGITS, LABELS).entropy.sum().backward(),
    "bce_entropy": lambda: mk.bce_entropy(LOGITS, LOGITS.detach()).ce.sum().backward(),
    "q_hat": lambda: mk.q_hat(LOGITS, LABELS).sum().backward(),
    "linear": lambda: mk.linear_mixupe_loss(
        torch.randn(8, 5, requires_grad=True), torch.randn(10, 5, requires_grad=True), LABELS, eta=0.1
    ).backward(),
    "exact_q": lambda: mk.exact_q(torch.nn.Linear(5, 10), SAMPLES.detach(), LABELS, mk.input_mean(SAMPLES.detach())),
    "mix": lambda: mk.mix(SAMPLES, PARTNER, LAM).sum().backward(),
    "mix, flip": lambda: mk.mix(SAMPLES, "flip", 0.3).sum().backward(),
    "mix, several": lambda: mk.mix(SAMPLES, PARTNER[:, None].expand(8, 3), LAM[:, None].expand(8, 3)).sum().backward(),
    "mix_labels": lambda: mk.mix_labels(LABELS, PARTNER, LAM.detach(), 10),
    "dense": lambda: mk.MixupE()(SAMPLES.detach(), LABELS)[1].dense(10),
    "mixed_accuracy": lambda: mk.mixed_accuracy(
        LOGITS.detach(), mk.MixupE(regularize="mixed")(SAMPLES.detach(), LABELS)[1]
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(watched, name):
    assert watched(FUNCTIONS[name]) == []


@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x.to("cpu"), lambda x: torch.tensor([1.0]) + x])
def test_waiting_is_seen(watched, waits):
    try:
        found = watched(lambda: waits(torch.randn(3)))
    except (RuntimeError, NotImplementedError):  # meta has no values to give
        return
    assert found
