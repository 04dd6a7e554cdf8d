"""skorch: a classifier whose loader mixes, and whose predictions are probabilities."""

from typing import Any

import torch
from skorch import NeuralNetClassifier
from skorch.dataset import unpack_data

from ..batch.batch_norm import telling
from ..batch.collate import Collate
from ..loss.criterion import MixupELoss
from ..target import MixedTarget


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


class MixupClassifier(NeuralNetClassifier):
    """``NeuralNetClassifier`` for modules that return logits, trained on the batches of a :class:`Collate`.

    ``MixupClassifier(Net, iterator_train__collate_fn=mk.Collate(mixup_fn), criterion__clean_weight=1 / 4)``. Validation is on
    plain batches, by the same criterion: plain cross-entropy. ``set_epoch`` is called before each epoch; a continued fit
    (``partial_fit``) goes on counting.

    Args:
        module, criterion, predict_nonlinearity, kwargs: as ``NeuralNetClassifier``. Its criterion here is :class:`MixupELoss`,
            and probabilities are the softmax of the logits.
    """

    def __init__(
        self,
        module: Any,
        *args: Any,
        criterion: Any = MixupELoss,
        predict_nonlinearity: Any = probabilities,
        **kwargs: Any,
    ):
        super().__init__(module, *args, criterion=criterion, predict_nonlinearity=predict_nonlinearity, **kwargs)

    def on_epoch_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        super().on_epoch_begin(net, *args, **kwargs)
        collate = getattr(self, "iterator_train__collate_fn", None)
        if isinstance(collate, Collate):
            collate.mixup_fn.set_epoch(len(self.history) - 1)

    def train_step_single(self, batch: Any, **fit_params: Any) -> Any:
        x, target = unpack_data(batch)
        if not isinstance(target, MixedTarget):
            target = MixedTarget(target, target, torch.ones(len(target)), 0, 0, 0.0)
            return self._told(target, (x, target.labels), **fit_params)
        return self._told(target, batch, **fit_params)

    def _told(self, target: MixedTarget, batch: Any, **fit_params: Any) -> Any:
        with telling(target.lam, target.num_mixed):
            return super().train_step_single(batch, **fit_params)

    def get_loss(self, y_pred: Any, y_true: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(y_true, MixedTarget):  # skorch would make six tensors of it
            return self.criterion_(y_pred, y_true.to(self.device))
        return super().get_loss(y_pred, y_true, *args, **kwargs)
