"""fastai: a callback that mixes the batches of training."""

from contextlib import ExitStack

from fastai.callback.core import Callback
from torch import Tensor

from ..batch.batch_norm import telling
from ..batch.mixup import Mixup


class MixupCallback(Callback):
    """In the place of fastai's ``MixUp``: ``Learner(..., loss_func=mk.MixupELoss(...), cbs=MixupCallback(mixup_fn))``.

    The model sees the mixer's rows, layers of :func:`split_batch_norm` are told which are mixed, and the loss function gets
    their target. Validation is on plain batches. ``set_epoch`` is called before each epoch.

    Args:
        mixup_fn: a :class:`MixupE` or :class:`Mixup`.

    Raises:
        TypeError: for an argument of another type.
    """

    order = 60  # after Normalize and other callbacks that change a batch
    run_valid = False

    def __init__(self, mixup_fn: Mixup):
        if not isinstance(mixup_fn, Mixup):
            raise TypeError(f"mixup_fn must be a Mixup or MixupE, got {type(mixup_fn).__name__}")
        super().__init__()
        self.mixup_fn, self._told = mixup_fn, ExitStack()

    def before_train(self) -> None:
        self.mixup_fn.set_epoch(self.epoch)

    def before_batch(self) -> None:
        plain = tuple(x.as_subclass(Tensor) if isinstance(x, Tensor) else x for x in self.xb)
        labels = self.yb[0].as_subclass(Tensor)
        self._told.close()  # of a batch whose model raised
        x, target = self.mixup_fn(plain[0] if len(plain) == 1 else plain, labels)
        self.learn.xb, self.learn.yb = ((x,) if len(plain) == 1 else x), (target,)
        self._told.enter_context(telling(target.lam, target.num_mixed))

    def after_pred(self) -> None:
        self._told.close()

    def after_cancel_batch(self) -> None:
        self._told.close()
