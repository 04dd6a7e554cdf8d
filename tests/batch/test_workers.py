"""Mixers in the collate function of a data loader: streams, schedules and counts in worker processes."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import mixupe_kernels as mk

BATCH = 4


class Collate:
    """What a data loader's worker runs: the mixed target, with the samples that it was made for."""

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, rows):
        x, labels = default_collate(rows)
        return self.fn(x, labels)[1]


def loader(fn, batches, workers, **options):
    data = [(torch.full((2,), float(i)), i % 3) for i in range(BATCH * batches)]
    if workers == 0:
        options = {}
    return DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=Collate(fn), **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


KINDS = [
    pytest.param(workers, options, id=f"{workers}-{'-'.join(map(str, options.values()))}")
    for workers, options in [
        (0, {}),
        (2, {"multiprocessing_context": "fork"}),
        (4, {"multiprocessing_context": "fork"}),
        (2, {"multiprocessing_context": "fork", "persistent_workers": True}),
    ]
]


@pytest.mark.parametrize(("workers", "options"), KINDS)
def test_every_batch_has_its_own_lam(workers, options):
    fn = mk.Mixup(generator=seeded())
    batches = loader(fn, 6, workers, **options)
    lams = [float(target.lam[0]) for _ in range(2) for target in batches]
    assert len(set(lams)) == len(lams)
    assert fn.steps == 12


def test_the_same_seeds_give_the_same_batches_and_others_do_not():
    def lams(seed, torch_seed):
        torch.manual_seed(torch_seed)
        return [float(target.lam[0]) for target in loader(mk.Mixup(generator=seeded(seed)), 4, 2)]

    first = lams(0, 0)
    assert lams(0, 0) == first
    assert set(first).isdisjoint(lams(1, 0)) and set(first).isdisjoint(lams(0, 1))


def test_a_generator_gives_other_numbers_than_the_workers_default():
    torch.manual_seed(0)
    default = [float(target.lam[0]) for target in loader(mk.Mixup(), 2, 2)]
    torch.manual_seed(0)
    assert set(default).isdisjoint(float(target.lam[0]) for target in loader(mk.Mixup(generator=seeded()), 2, 2))


class TwoMixers(Collate):
    def __call__(self, rows):
        x, labels = default_collate(rows)
        return [fn(x, labels)[1] for fn in self.fn]


def test_mixers_that_share_a_generator_take_turns():
    generator = seeded()
    collate = TwoMixers([mk.Mixup(generator=generator), mk.Mixup(generator=generator)])
    data = [(torch.zeros(2), 0)] * 16
    lams = [float(t.lam[0]) for pair in DataLoader(data, 4, num_workers=1, collate_fn=collate) for t in pair]
    assert len(set(lams)) == 8


@pytest.mark.parametrize(("workers", "options"), KINDS)
def test_one_batch_in_interval_is_regularized(workers, options):
    fn = mk.MixupE(interval=4, generator=seeded())
    batches = loader(fn, 16, workers, **options)
    for epoch in range(2):
        fn.set_epoch(epoch)
        targets = list(batches)
        assert sum(target.num_reg > 0 for target in targets) == 4
        assert fn.steps == 16 * (epoch + 1)


@pytest.mark.parametrize(
    ("workers", "persistent"), [(1, False), (2, True)]
)  # two processes, each of which imports torch
def test_spawned_workers(workers, persistent):
    fn = mk.MixupE(interval=2, warmup_epochs=1, generator=seeded())
    batches = loader(fn, 4, workers, multiprocessing_context="spawn", persistent_workers=persistent)
    lams = []
    for epoch in range(2):
        fn.set_epoch(epoch)
        targets = list(batches)
        assert sum(target.num_reg > 0 for target in targets) == 2 * epoch
        lams += [float(target.lam[0]) for target in targets]
    assert lams[:4] == [1.0] * 4 and len(set(lams)) == 5 and fn.steps == 4


@pytest.mark.parametrize("persistent", [False, True])
def test_interval_longer_than_a_workers_share_of_an_epoch(persistent):
    fn = mk.MixupE(interval=16)
    batches = loader(fn, 8, 4, persistent_workers=persistent)
    regularized = [target.num_reg > 0 for _ in range(8) for target in batches]
    assert sum(regularized) == 4 and fn.steps == 64


@pytest.mark.parametrize(("workers", "options"), KINDS)
def test_schedules_reach_the_workers(workers, options):
    fn = mk.MixupE(
        mk.LinearRamp(0.5, 2.0, last_epoch=3),
        warmup_epochs=1,
        off_epoch=4,
        eta_ramp=mk.LinearRamp(0, 3, last_epoch=3),
    )
    batches = loader(fn, 2, workers, **options)
    for epoch in range(5):
        fn.set_epoch(epoch)
        for target in batches:
            assert target.num_reg == (BATCH if 1 <= epoch < 4 else 0)
            if target.num_reg:
                assert float(target.reg_weight) == pytest.approx(epoch * mk.expected_a_lambda(0.5 + 0.5 * epoch))
    fn.set_epoch(2)
    fn.enabled = False
    assert all(target.num_reg == 0 for target in batches)
    fn.enabled = True
    assert all(target.num_reg == BATCH for target in batches)


def test_a_resumed_run_regularizes_the_same_batches_of_its_workers():
    def regularized(fn):
        return [target.num_reg > 0 for target in loader(fn, 6, 2)]

    fn = mk.MixupE(interval=4)
    first = [regularized(fn) for _ in range(3)]
    whole = mk.MixupE(interval=4)
    assert regularized(whole) == first[0]
    resumed = mk.MixupE(interval=4)
    resumed.load_state_dict(pickle.loads(pickle.dumps(whole.state_dict())))
    assert [regularized(resumed) for _ in range(2)] == first[1:]
    assert resumed.steps == fn.steps


def test_copies_share_no_state():
    fn = mk.MixupE(interval=3)
    fn.steps = 5
    twin = pickle.loads(pickle.dumps(fn))
    fn.set_epoch(2)
    fn.steps = 6
    assert (twin.epoch, twin.steps) == (0, 5)
    twin(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    assert (fn.steps, twin.steps) == (6, 6)
