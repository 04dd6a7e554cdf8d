"""The collate class: in the main process, in forked and spawned workers, with dicts and other collate functions."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

import mixupe_kernels as mk


def data(count=32):
    return TensorDataset(torch.arange(count).float().view(-1, 1).expand(count, 3), torch.arange(count) % 5)


def loader(mixup_fn, workers=0, **options):
    return DataLoader(data(), 8, collate_fn=mk.Collate(mixup_fn), num_workers=workers, **options)


def test_it_mixes_what_the_other_function_collates():
    generator = torch.Generator().manual_seed(0)
    mixup_fn = mk.MixupE(clean_fraction=1 / 4, generator=generator)
    state = generator.get_state()
    samples = [data()[i] for i in range(8)]
    x, target = mk.Collate(mixup_fn)(samples)
    generator.set_state(state)
    expected, again = mk.MixupE(clean_fraction=1 / 4, generator=generator)(*default_collate(samples))
    assert torch.equal(x, expected) and torch.equal(target.lam, again.lam)


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}], ids=str)
def test_workers(options):
    mixup_fn = mk.MixupE(clean_fraction=1 / 4, warmup_epochs=1, generator=torch.Generator().manual_seed(0))
    batches = loader(mixup_fn, 2, **options)
    lams = []
    for epoch in range(3):
        mixup_fn.set_epoch(epoch)
        for x, target in batches:
            assert target.num_rows == len(x) == (8 if epoch == 0 else 16)
            lams.append(float(target.lam[0]))
    assert lams[:4] == [1.0] * 4 and len(set(lams[4:])) == 8 and mixup_fn.steps == 8


def test_dicts_and_several_inputs():
    samples = [{"x": torch.randn(3), "ids": i, "labels": i % 5} for i in range(8)]
    batch = mk.Collate(mk.MixupE(clean_fraction=1 / 4))(samples)
    assert isinstance(batch["labels"], mk.MixedTarget) and len(batch["x"]) == len(batch["ids"]) == 16
    first, second, target = mk.Collate(mk.MixupE())([(torch.randn(3), torch.randn(2), i % 5) for i in range(8)])
    assert first.shape == (16, 3) and second.shape == (16, 2) and target.num_rows == 16


def test_it_pickles():
    assert isinstance(pickle.loads(pickle.dumps(mk.Collate(mk.MixupE()))).mixup_fn, mk.MixupE)


def test_what_it_refuses():
    with pytest.raises(TypeError, match="mixup_fn must be a Mixup or MixupE, got function"):
        mk.Collate(lambda x, labels: (x, labels))
    with pytest.raises(TypeError, match="collate_fn must be callable, got str"):
        mk.Collate(mk.MixupE(), "default")
    with pytest.raises(TypeError, match=r"batch must be \(x, labels\), or a dict with labels, got Tensor"):
        mk.Collate(mk.MixupE())([torch.randn(3) for _ in range(4)])
    with pytest.raises(ValueError, match="mixup_fn must have a generator on the CPU"):
        mk.Collate(OnDevice())


class OnDevice(mk.Mixup):
    """A mixer whose generator says that it is on a device that this machine need not have."""

    def __init__(self):
        super().__init__()

        class Generator:
            device = torch.device("cuda")

        self.plan.generator = Generator()
