"""Lightning: the callback in a real fit, with data modules, accumulation, checkpoints and validation."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import mixupe_kernels as mk

from . import library

pl = library("lightning.pytorch")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loader(count=64):
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(count, 6), torch.randint(4, (count,))), 8)


def trainer(callback, **options):
    options = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, **options}
    return pl.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **options,
    )


@pytest.fixture
def parts():
    from mixupe_kernels.integrations.lightning import MixupCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = mk.split_batch_norm(
                torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
            )
            self.criterion = mk.MixupELoss(eta=0.1, clean_weight=1 / 4)
            self.seen, self.validated, self.epochs = [], [], []

        def training_step(self, batch, batch_idx):
            x, target = batch
            self.seen.append((len(x), target))
            return self.criterion(mk.forward_mixupe(self.model, x, target), target)

        def validation_step(self, batch, batch_idx):
            x, labels = batch
            self.validated.append(isinstance(labels, torch.Tensor) and not isinstance(labels, mk.MixedTarget))
            self.log("loss", self.criterion(self.model(x), labels))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module, MixupCallback


def mixer():
    return mk.MixupE(clean_fraction=1 / 2, warmup_epochs=1)


def test_a_fit(parts, followed):
    Module, MixupCallback = parts
    module, mixup_fn = Module(), mixer()
    fit = trainer(MixupCallback(mixup_fn))
    fit.fit(module, loader(), loader(16))
    assert [rows for rows, _ in module.seen] == [8] * 8 + [16] * 8  # a warm-up of one epoch: set_epoch was called
    assert all(isinstance(target, mk.MixedTarget) for _, target in module.seen)
    assert module.validated and all(module.validated)
    assert followed.losses == followed.mixed == 10
    assert {"train/mix_loss", "train/clean_loss", "train/reg", "train/eta_hat"} <= set(fit.logged_metrics)
    assert "on_after_batch_transfer" not in vars(module)  # taken away again
    fit.validate(module, loader(16), verbose=False)


@pytest.mark.parametrize("overridden", [False, True])
def test_data_modules(parts, overridden):
    Module, MixupCallback = parts

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

    if overridden:
        Data.on_after_batch_transfer = lambda self, batch, index: (batch[0] + 100, batch[1])
    module = Module()
    trainer(MixupCallback(mk.MixupE()), max_epochs=1).fit(module, datamodule=Data())
    assert [rows for rows, _ in module.seen] == [16] * 8


def test_the_modules_own_hook_runs_first(parts):
    Module, MixupCallback = parts

    class Own(Module):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 0 + 7, batch[1]

        def training_step(self, batch, batch_idx):
            assert bool((batch[0] - 7).abs().max() < 1e-5)
            return super().training_step(batch, batch_idx)

    trainer(MixupCallback(mk.MixupE()), max_epochs=1).fit(Own(), loader())


def test_accumulation_and_clipping(parts):
    Module, MixupCallback = parts
    module = Module()
    trainer(MixupCallback(mk.MixupE()), accumulate_grad_batches=4, gradient_clip_val=1.0, max_epochs=1).fit(
        module, loader()
    )
    assert len(module.seen) == 8


def test_a_checkpoint_holds_the_mixer(parts, tmp_path):
    Module, MixupCallback = parts
    fn = mk.MixupE(interval=3, generator=torch.Generator().manual_seed(5))
    fit = trainer(MixupCallback(fn), max_epochs=1)
    fit.fit(Module(), loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = mk.MixupE(interval=3, generator=torch.Generator().manual_seed(6))
    resumed = trainer(MixupCallback(again), max_epochs=2)
    resumed.fit(Module(), loader(), ckpt_path=tmp_path / "last.ckpt")
    straight = mk.MixupE(interval=3, generator=torch.Generator().manual_seed(5))
    trainer(MixupCallback(straight), max_epochs=2).fit(Module(), loader())
    assert again.steps == straight.steps == 16
    assert torch.equal(again.generator.get_state(), straight.generator.get_state())


def test_a_forgotten_forward_mixupe(parts):
    Module, MixupCallback = parts

    class Forgot(Module):
        def training_step(self, batch, batch_idx):
            return self.criterion(self.model(batch[0]), batch[1])

    module = Forgot()
    with pytest.raises(RuntimeError, match=r"write forward_mixupe\(model, x, target\)"):
        trainer(MixupCallback(mk.MixupE()), max_epochs=1).fit(module, loader())
    assert "on_after_batch_transfer" not in vars(module)  # or the next fit would mix twice


def test_what_it_refuses(parts):
    _, MixupCallback = parts
    with pytest.raises(TypeError, match="mixup_fn must be a Mixup or MixupE, got float"):
        MixupCallback(0.5)
    with pytest.raises(TypeError, match="log must be a prefix or None, got bool True"):
        MixupCallback(mk.MixupE(), log=True)
