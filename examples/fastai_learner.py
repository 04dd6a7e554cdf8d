"""fastai: MixupCallback in the place of fastai's MixUp: python examples/fastai_learner.py

The loss function, the callback and split_batch_norm differ from a learner without mixing.
"""

import fastai.callback.all  # noqa: F401  gives learners fit_one_cycle and a progress bar
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import error_rate
from shared import Curve, arguments, images, small_cnn

import mixupe_kernels as mk
from mixupe_kernels.integrations.fastai import MixupCallback


def main():
    args = arguments(__doc__, epochs=12)
    data, curve = images(args), Curve(args)
    model = mk.split_batch_norm(small_cnn(data.channels, data.classes))
    learn = Learner(
        DataLoaders(*data.loaders(args)),
        model,
        loss_func=mk.MixupELoss(eta=1e-3, clean_weight=1 / 4),
        metrics=error_rate,
        cbs=MixupCallback(mk.MixupE(alpha=1.0, clean_fraction=1 / 4)),
    )
    learn.fit_one_cycle(args.epochs, 0.02)
    for train, valid, error in learn.recorder.values:
        curve.add(loss=train, valid_loss=valid, error=100 * error)
    curve.save()


if __name__ == "__main__":
    main()
