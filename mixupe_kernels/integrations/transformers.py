"""Transformers: a mixin for ``Trainer`` that mixes what has come to the device and computes the loss of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..batch.batch_norm import telling
from ..batch.mixup import Mixup
from ..loss.criterion import MixupELoss


class _Epochs(TrainerCallback):
    def __init__(self, mixup_fn: Mixup):
        self.mixup_fn = mixup_fn

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mixup_fn.set_epoch(state.epoch or 0.0)


class MixupTrainer:
    """What ``class MyTrainer(MixupTrainer, Trainer)`` adds to a ``Trainer``: in training, mixed batches and their loss.

    Floating-point inputs such as ``pixel_values`` are mixed. Token ids cannot be: their embeddings are, ``input_ids`` becoming
    ``inputs_embeds`` by the model's ``get_input_embeddings()``. Attention masks, and what else has one row for each sample,
    follow the rows, a mixed row having its own sample's. The loss is a mean over the batch, which the Trainer divides by the
    steps of gradient accumulation. Evaluation and prediction are the Trainer's own. ``set_epoch`` is called before each epoch,
    and the parts of the loss are logged with it.

    Args:
        mixup_fn: a :class:`MixupE` or :class:`Mixup`.
        criterion: a :class:`MixupELoss`; ``MixupELoss()`` if None.

    All other arguments are the Trainer's; ``compute_loss_func`` must be None.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.
    """

    loss_is_scaled_for_ga = False  # the Trainer's name: it divides this loss by the steps of accumulation

    def __init__(self, *args: Any, mixup_fn: Mixup, criterion: MixupELoss | None = None, **kwargs: Any):
        if not isinstance(mixup_fn, Mixup):
            raise TypeError(f"mixup_fn must be a Mixup or MixupE, got {type(mixup_fn).__name__}")
        if criterion is not None and not isinstance(criterion, MixupELoss):
            raise TypeError(f"criterion must be a MixupELoss or None, got {type(criterion).__name__}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func must be None with MixupTrainer, whose loss is criterion")
        super().__init__(*args, **kwargs)
        self.mixup_fn, self.criterion = mixup_fn, criterion or MixupELoss()
        self.add_callback(_Epochs(mixup_fn))  # type: ignore[attr-defined]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        key = self.mixup_fn.labels_key
        if not model.training or key not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        if "inputs_embeds" not in inputs and "input_ids" in inputs:
            # Of the model within its wrappers, whose embedding of these ids is part of the graph as in its own forward.
            embed = self.model.get_input_embeddings()  # type: ignore[attr-defined]
            inputs["inputs_embeds"] = embed(inputs.pop("input_ids"))
        inputs, target = self.mixup_fn(inputs)
        del inputs[key]
        with telling(target.lam, target.num_mixed):
            outputs = model(**inputs)
        loss = self.criterion(outputs["logits"] if isinstance(outputs, Mapping) else outputs[0], target)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        last = self.criterion.last
        if "loss" in logs and last is not None:
            logs |= {name: float(part) for name, part in last._asdict().items()}
        super().log(logs, *args, **kwargs)
