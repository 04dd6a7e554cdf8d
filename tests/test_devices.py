"""Devices that are neither CPU nor CUDA run the reference, without float64, ``_assert_async`` or a Gamma sampler of their own.

Shown on the meta device, which is made to lack them.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mixupe_kernels as mk
from mixupe_kernels import conventions
from mixupe_kernels.batch import randomness, sampling
from mixupe_kernels.ops import registration

from .ops.test_opcheck import opcheck_cases

META = torch.device("meta")
LACKING = ("_assert_async", "_standard_gamma")


class Lacking(TorchDispatchMode):
    """Refuses what the device does not have."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        there = [value for value in tree_leaves((args, result)) if isinstance(value, torch.Tensor)]
        there = [value for value in there if value.device.type == self.device]
        assert all(value.dtype != torch.float64 for value in there), f"{func} in float64"
        assert not there or not any(name in str(func) for name in LACKING), func
        return result


@pytest.fixture
def other(monkeypatch):
    """The meta device, said to lack what others do: a context in which tensors are on it."""
    monkeypatch.setattr(conventions, "_HAVE_FLOAT64", ("cpu",))
    monkeypatch.setattr(randomness, "_HAVE_GAMMA", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.ones(self.shape, dtype=self.dtype, device="cpu"))

    @contextlib.contextmanager
    def context():
        with META, Lacking("meta"):
            yield

    return context


@pytest.mark.parametrize("name", sorted(registration.references()))
def test_the_reference(other, name):
    cases = [case for case in opcheck_cases() if case[0] == name]
    assert cases
    with other():
        for _, *arguments in cases:
            args, kwargs = tree_map_only(torch.Tensor, lambda value: value.detach().to(META), arguments)
            Flat = registration.signature_of(getattr(torch.ops.mixupe, name).default).Flat
            written = {name: kwargs.pop(name) for name in list(kwargs) if name not in Flat._fields}
            registration.references()[name](*Flat(*args, **kwargs), **written)


OPTIONS = [
    {},
    {"alpha": 0.4, "per_sample": True},
    {"alpha": 0.1},
    {"alpha": 1.0, "cutmix_alpha": 0.5},
    {"pairing": "different_class", "clean_fraction": 0.25},
    {"alpha": 0.3, "num_samples": 3, "num_classes": 10},
    {"lam_distribution": mk.sampling.WShaped(0.5)},
    {"mean": (0.1, 0.2, 0.3), "std": (0.1, 0.2, 0.3)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step(other, options):
    mixer, criterion = mk.MixupE(**options), mk.MixupELoss(eta=0.1)
    with other():
        x, labels = torch.randn(8, 3, 6, 6), torch.zeros(8, dtype=torch.int64)
        weight = torch.randn(108, 10, requires_grad=True)
        rows, target = mixer(x, labels)
        assert rows.device == target.lam.device == META
        logits = rows.flatten(1) @ weight
        criterion(logits, target).backward()
        mk.mixed_accuracy(logits.detach(), target)
        mk.linear_mixupe_loss(rows.flatten(1), weight.t(), target, eta=0.1).backward()
        mk.mixupe_loss(logits.detach(), (labels[:1].expand(len(logits)),) * 2 + (0.5,), eta=0.1)
        mk.input_mean([(x, labels)])


def test_gamma_variates_of_other_devices_come_from_the_cpu(monkeypatch):
    monkeypatch.setattr(randomness, "_HAVE_GAMMA", ())
    laws = [
        mk.sampling.Beta(0.4).sample((1000,), torch.Generator().manual_seed(seed), torch.device("cpu"))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(laws[0], laws[1]) and not torch.equal(laws[0], laws[2])
    assert abs(float(laws[0].mean()) - 0.5) < 0.05
    torch.manual_seed(3)
    first = mk.sampling.Beta(0.4).sample((5,), None, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, mk.sampling.Beta(0.4).sample((5,), None, torch.device("cpu")))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 1.0])
def test_beta_in_float32_has_its_moments(monkeypatch, alpha):
    gammas = sampling._Gammas((alpha, alpha))
    monkeypatch.setattr(gammas, "_on_cpu", gammas._on_cpu.float())
    lam = gammas.draw((100_000,), torch.Generator().manual_seed(0), torch.device("cpu")).select(-1, 0)
    assert lam.dtype == torch.float32 and lam.isfinite().all()
    assert float(lam.mean()) == pytest.approx(0.5, abs=0.01)
    assert float((2 * lam * (1 - lam)).mean()) == pytest.approx(alpha / (2 * alpha + 1), abs=0.01)
