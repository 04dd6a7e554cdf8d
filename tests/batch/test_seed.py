"""Draws from ``seed=`` in one process; tests/ranks has what several do."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

import mixupe_kernels as mk


def lam_of(mixer, rows=6):
    return mixer(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64))[1].lam


def seeded(**options):
    return mk.Mixup(per_sample=True, seed=5, **options)


def test_a_seed_draws_the_same_whatever_torch_does():
    first = lam_of(seeded())
    torch.manual_seed(1)
    assert torch.equal(lam_of(seeded()), first)
    assert not torch.equal(lam_of(mk.Mixup(per_sample=True, seed=6)), first)


def test_a_copy_goes_on_with_the_same_draws():
    mixer = seeded()
    lam_of(mixer)
    for copied in (pickle.loads(pickle.dumps(mixer)), copy.deepcopy(mixer)):
        assert "seed=5" in repr(copied) and "generator" not in repr(copied)
        assert torch.equal(lam_of(copied), lam_of(copy.deepcopy(mixer)))


def test_a_rank_that_torchrun_started_draws_its_own(monkeypatch):
    first = lam_of(seeded())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not torch.equal(lam_of(seeded()), first)
    assert torch.equal(lam_of(seeded(same_draws=True)), first)


class Collate:
    def __init__(self, mixer):
        self.mixer = mixer

    def __call__(self, samples):
        return lam_of(self.mixer, len(samples))


def test_workers_draw_apart_in_each_epoch():
    mixer = seeded()
    loader = DataLoader(range(16), batch_size=4, num_workers=2, collate_fn=Collate(mixer), persistent_workers=True)
    found = []
    for epoch in range(3):
        mixer.set_epoch(epoch)
        found += list(loader)
    assert len({tuple(lam.tolist()) for lam in found}) == len(found) == 12
    assert mixer.steps == 12


@pytest.mark.parametrize(
    "change", [{"ranks": 2}, {"ranks": (0, 1, 2)}, {"ranks": (0, "1")}, {"generator": "x"}, {"seed": 6}]
)
def test_a_state_that_is_none_of_a_seed_is_refused(change):
    mixer = seeded()
    state, before = mixer.state_dict(), copy.deepcopy(mixer)
    mixer.set_epoch(1)
    name = "seed" if "seed" in change else f"state..{next(iter(change))}"
    with pytest.raises((TypeError, ValueError), match=name):
        before.load_state_dict({**state, **change})
    assert torch.equal(lam_of(before), lam_of(seeded()))


def test_a_state_of_a_later_epoch_is_taken_whole():
    mixer = seeded(warmup_epochs=1)
    mixer.set_epoch(2)
    lam_of(mixer)
    other = seeded(warmup_epochs=1)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(lam_of(other), lam_of(mixer)) and other.steps == mixer.steps
