"""Manifold Mixup (Verma et al., 2019): the rows of a batch are mixed at the output of a layer picked at random."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..target import MixedTarget, check_ids, check_labels
from .mixup import Mixup
from .plan import Draw

INPUT = "input"


class ManifoldMixup:
    """Run a model with its batch mixed at the input or at the output of a hidden layer, picked at random for each batch.

    Args:
        model: takes (B, ...) to (B, C), rows apart: each row of what follows a layer must come from that row of its
            output alone, so pick layers that no skip connection bypasses.
        layers: names of modules of the model, as ``model.named_modules()`` has them, whose outputs are tensors (B, ...);
            ``"input"`` is the input itself. Verma et al. use the input and the first residual stages.
        mixup_fn: what is drawn: a :class:`Mixup` or :class:`MixupE`, whose clean rows join at the layer, so that nothing
            before it is computed twice. Its mean, std, dtype and memory_format apply to the input.
        generator: picks the layer; a CPU generator, so that nothing synchronises; torch's default if None.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, a name that is not a module's, or CutMix or
            ``inplace``, which are for inputs only.

    Calling it with ``x`` (or a tuple or dict of inputs, passed as ``model(*x)`` or ``model(**x)``) and ``labels``,
    (B,) int64 or (B, C) soft, returns ``(logits, MixedTarget)``, (N, C) of N rows; ``layer`` then is the name picked.
    Only calls through it mix: ``model(x)`` is the model as ever.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        mixup_fn: Mixup,
        *,
        generator: torch.Generator | None = None,
    ):
        if isinstance(layers, str) or not layers:
            raise TypeError(f"layers must be a sequence of names, at least one, got {layers!r}")
        modules = dict(model.named_modules())
        for name in layers:
            if name != INPUT and (not name or name not in modules):
                raise ValueError(f"layers must name modules of the model or 'input', got {name!r}")
        if not isinstance(mixup_fn, Mixup):
            raise TypeError(f"mixup_fn must be a Mixup or MixupE, got {type(mixup_fn).__name__}")
        if mixup_fn.cutmix_alpha is not None or mixup_fn.inplace:
            raise ValueError(
                "mixup_fn must have neither cutmix_alpha nor inplace: hidden layers have no images of the input"
            )
        self.model = model
        self.layers = tuple(layers)
        self.mixup_fn = mixup_fn
        self.generator = generator
        self.layer: str | None = None

    def __call__(
        self, x: Tensor | Sequence | Mapping, labels: Tensor, *, ids: Tensor | None = None
    ) -> tuple[Any, MixedTarget]:
        self.layer = self.layers[int(torch.randint(len(self.layers), (), generator=self.generator))]
        if self.layer == INPUT:
            x, target = self.mixup_fn(x, labels, ids=ids)
            return self._forward(x), target
        checks.tensor("labels", labels)
        check_labels(labels, labels.shape[0] if labels.dim() else 0, labels)
        if ids is not None:
            check_ids(ids, labels)
        if not self.mixup_fn.transform.is_identity:
            x, _ = self.mixup_fn.plain(x, labels)
        draw = self.mixup_fn.draw(labels, ids=ids)
        calls = []

        def mix_output(module: nn.Module, args: tuple, output: Any) -> Any:
            if calls:  # a module that is used more than once mixes its first output
                return None
            calls.append(module)
            return self._mixed(draw, output, labels)

        handle = self.model.get_submodule(self.layer).register_forward_hook(mix_output)
        try:
            logits = self._forward(x)
        finally:
            handle.remove()
        if not calls:
            raise RuntimeError(f"layers must run in the model's forward, but {self.layer!r} did not")
        return logits, draw.target

    def _mixed(self, draw: Draw, output: Any, labels: Tensor) -> Tensor:
        name = f"the output of layer {self.layer!r}"
        checks.tensor(name, output)
        checks.dtype(name, output, checks.LOGITS_DTYPES)
        if output.dim() == 0 or output.shape[0] != labels.shape[0]:
            raise ValueError(f"{name} must have {labels.shape[0]} rows, as labels have, got {tuple(output.shape)}")
        checks.same_device(name, output, "labels", labels)
        return self.mixup_fn.apply(draw, output)

    def _forward(self, x: Tensor | Sequence | Mapping) -> Any:
        if isinstance(x, Mapping):
            return self.model(**x)
        return self.model(*x) if isinstance(x, (tuple, list)) else self.model(x)
