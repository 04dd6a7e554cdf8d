"""Lightning: a callback that mixes the batches of training, after their transfer to the device."""

import functools
from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities.model_helpers import is_overridden

from ..batch.collate import mix_batch
from ..batch.mixup import Mixup
from ..loss.criterion import MixupELoss

_HOOK = "on_after_batch_transfer"


class MixupCallback(Callback):
    """``training_step`` gets ``(x, target)`` of the mixer in place of ``(x, labels)``; other steps get plain batches.

    It mixes last in ``on_after_batch_transfer``, the module's or the data module's, whichever Lightning calls. ``set_epoch`` is
    called before each epoch, the mixer's state is saved with checkpoints and restored from them, and the parts of the loss
    are logged.

    Args:
        mixup_fn: a :class:`MixupE` or :class:`Mixup`.
        log: the prefix that ``mix_loss``, ``clean_loss``, ``reg`` and ``eta_hat`` of the module's first :class:`MixupELoss` are
            logged with; nothing is logged if None.

    Raises:
        TypeError: for an argument of another type.

    Batches are ``(x, labels)``, ``(x, ..., labels)``, or dicts with labels, which then hold the target.
    """

    def __init__(self, mixup_fn: Mixup, log: str | None = "train/"):
        if not isinstance(mixup_fn, Mixup):
            raise TypeError(f"mixup_fn must be a Mixup or MixupE, got {type(mixup_fn).__name__}")
        if log is not None and not isinstance(log, str):
            raise TypeError(f"log must be a prefix or None, got {type(log).__name__} {log!r}")
        self.mixup_fn, self.prefix = mixup_fn, log
        self._hooked: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        owner = data if data is not None and is_overridden(_HOOK, data) else pl_module
        original = getattr(owner, _HOOK)

        @functools.wraps(original)
        def mixed(batch: Any, dataloader_idx: int) -> Any:
            batch = original(batch, dataloader_idx)
            return mix_batch(self.mixup_fn, batch) if trainer.training else batch

        setattr(owner, _HOOK, mixed)
        self._hooked.append(owner)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._hooked:
            vars(self._hooked.pop()).pop(_HOOK, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mixup_fn.set_epoch(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        criterion = next((part for part in pl_module.modules() if isinstance(part, MixupELoss)), None)
        if self.prefix is not None and criterion is not None and criterion.last is not None:
            pl_module.log_dict({f"{self.prefix}{name}": part for name, part in criterion.last._asdict().items()})

    def state_dict(self) -> dict[str, Any]:
        return self.mixup_fn.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.mixup_fn.load_state_dict(state_dict)
