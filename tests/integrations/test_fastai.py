"""fastai: the callback in a learner, with its schedules, metrics and mixed precision left as they are."""

import pytest
import torch

import mixupe_kernels as mk

from . import library

library("fastai.basics")
library("fastai.callback.all")  # gives learners fit_one_cycle and no_bar


def dls(count=64):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    torch.manual_seed(1)
    labels = torch.randint(3, (count,))
    x = torch.nn.functional.one_hot(labels, 6) + 0.3 * torch.randn(count, 6)
    data = list(zip(x.to(torch.get_default_dtype()), labels, strict=True))
    return DataLoaders(DataLoader(data, bs=8, shuffle=True), DataLoader(data, bs=16), device="cpu")


def learner(mixup_fn, **options):
    from fastai.learner import Learner
    from fastai.metrics import accuracy

    from mixupe_kernels.integrations.fastai import MixupCallback

    model = mk.split_batch_norm(
        torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    )
    criterion = mk.MixupELoss(eta=0.1, clean_weight=1 / 4)
    return Learner(dls(), model, loss_func=criterion, metrics=accuracy, cbs=MixupCallback(mixup_fn), **options)


def test_a_fit(followed):
    followed.returned = torch.float32
    learn = learner(mk.MixupE(clean_fraction=1 / 4))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(4, 1e-2)
    assert followed.losses == followed.mixed == 10
    train, valid, accuracy = learn.recorder.values[-1]
    assert accuracy > 0.9 and valid > 0
    loss, plain = learn.validate()
    assert loss == pytest.approx(valid) and plain == pytest.approx(accuracy)


def test_the_schedule_is_driven():
    mixup_fn = mk.MixupE(warmup_epochs=1)
    learn = learner(mixup_fn)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
    assert mixup_fn.epoch == 1 and mixup_fn.steps == 8


def test_accumulation_and_early_ends():
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.training import GradientAccumulation

    learn = learner(mk.MixupE())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=GradientAccumulation(32))

    class Stop(Callback):
        def after_loss(self):
            raise CancelFitException()

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Stop())
    with pytest.raises(RuntimeError, match="forward_mixupe"):  # no layer is told any more
        learn.model.train()(torch.randn(4, 6))


def test_pictures_that_fastai_has_typed():
    from fastai.torch_core import TensorImage
    from fastai.vision.core import TensorCategory

    from mixupe_kernels.integrations.fastai import MixupCallback

    callback = MixupCallback(mk.MixupE())

    class Learn:
        xb, yb = (TensorImage(torch.rand(4, 3, 8, 8)),), (TensorCategory(torch.arange(4)),)

    callback.learn = Learn()
    callback.before_batch()
    callback.after_pred()
    (x,), (target,) = callback.learn.xb, callback.learn.yb
    assert type(x) is torch.Tensor and x.shape == (8, 3, 8, 8) and isinstance(target, mk.MixedTarget)


def test_what_it_refuses():
    from mixupe_kernels.integrations.fastai import MixupCallback

    with pytest.raises(TypeError, match="mixup_fn must be a Mixup or MixupE, got float"):
        MixupCallback(0.4)
