"""Manifold Mixup (Verma et al., 2019): the rows of a batch are mixed at the output of a layer picked at random."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import checks, ops
from ..target import MixedTarget, check_labels
from .batch_norm import tell, telling
from .mixup import Mixup
from .plan import Draw

INPUT = "input"
_WRAPPED = "_orig_mod"  # the attribute of what torch.compile(module) returns that holds the module


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name; of a compiled one the wrapper, by the name it has without."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        modules.setdefault(_unwrapped(name), module)
    return modules


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def _is_wrapper(module: nn.Module) -> bool:
    return hasattr(module, _WRAPPED)


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, whose graph has the module's own hooks in it."""
    return getattr(module, "_compiled_call_impl", None) is not None


class _Mixing:
    """One call's mixing of a module's output: in the block, and where the module is recomputed for the call's gradient.

    Activation checkpointing calls the module again in the backward pass. That pass reaches the gradient of the logits first:
    a hook there puts the module's hook in again, until the pass ends or comes to another call of the model, which ran earlier.
    """

    recomputed: "dict[nn.Module, _Mixing]" = {}  # model → the call that the backward pass is in

    def __init__(self, model: nn.Module, module: nn.Module, mix: Callable[[Any], Tensor]):
        self.model, self.module, self.mix = model, module, mix
        self.calls = 0
        self.handle: Any = None

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(self._mix_first)

    def __exit__(self, *_) -> None:
        self.remove()

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            if self.recomputed.get(self.model) is self:
                del self.recomputed[self.model]

    def _mix_first(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        self.calls += 1  # a module that is used more than once mixes its first output
        return self.mix(output) if self.calls == 1 else None

    def follow(self, logits: Any) -> None:
        for value in tree_leaves(logits):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._begin_backward)

    def _begin_backward(self, _: Tensor) -> None:
        if self.handle is None:
            if before := self.recomputed.get(self.model):
                before.remove()
            self.recomputed[self.model] = self
            self.handle = self.module.register_forward_hook(self._mix_again)
            # As torch.nn.parallel does it; a public hook for the end of a backward pass is missing.
            torch.autograd.Variable._execution_engine.queue_callback(self.remove)

    def _mix_again(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        if not ops.in_backward():  # a backward pass that failed
            self.remove()
            return None
        if self.calls > 1:
            raise RuntimeError(
                "layers must not name a module that is used more than once and recomputed by activation checkpointing: "
                "which of its outputs was mixed is not known then"
            )
        return self.mix(output)


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

    A layer under activation checkpointing is mixed as before when it is recomputed in the backward pass. Inside a compiled
    module, a call that mixes a hidden layer runs without the compiler, whose graph would leave the mixing out: compile parts
    of the model that end at the layers instead.

    Calling it with ``x`` (or a tuple or dict of inputs, passed as ``model(*x)`` or ``model(**x)``) and ``labels``,
    (B,) int64 or (B, C) soft, returns ``(logits, MixedTarget)``, (N, C) of N rows; ``layer`` then is the name picked.
    Only calls through it mix: ``model(x)`` is the model unchanged. The layers of :func:`split_batch_norm` are told here which
    of their rows are mixed: none before the layer, those of the target after it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        mixup_fn: Mixup,
        *,
        generator: torch.Generator | None = None,
    ):
        if not isinstance(layers, (list, tuple)) or not layers:
            raise TypeError(f"layers must be a sequence of names, at least one, got {layers!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        modules = _modules(model)
        for name in layers:
            known = isinstance(name, str) and _unwrapped(name) in modules
            if name != INPUT and not (name and known):
                raise ValueError(f"layers must name modules of the model or 'input', got {name!r}")
        if not isinstance(mixup_fn, Mixup):
            raise TypeError(f"mixup_fn must be a Mixup or MixupE, got {type(mixup_fn).__name__}")
        if mixup_fn.cutmix_alpha is not None or mixup_fn.inplace:
            raise ValueError(
                "mixup_fn must have neither cutmix_alpha nor inplace: hidden layers have no images of the input"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.model = model
        self.layers = tuple(map(_unwrapped, layers))
        self.mixup_fn = mixup_fn
        self.generator = generator
        self.layer: str | None = None

    def __call__(
        self, x: Tensor | Sequence | Mapping, labels: Tensor, *, ids: Tensor | None = None
    ) -> tuple[Any, MixedTarget]:
        checks.tensor("labels", labels)
        check_labels(labels, labels.shape[0] if labels.dim() else 0, labels)
        if ids is not None:
            checks.ids(ids, labels)
        if isinstance(x, Tensor) and x.shape[:1] != labels.shape[:1]:
            raise ValueError(f"x must have {labels.shape[0]} rows, as labels have, got {tuple(x.shape)}")
        self.layer = self.layers[int(torch.randint(len(self.layers), (), generator=self.generator))]
        if self.layer == INPUT:
            x, target = self.mixup_fn(x, labels, ids=ids)
            return self._forward(x, target.num_mixed, target.labels), target
        if not self.mixup_fn.transform.is_identity:
            x, _ = self.mixup_fn.plain(x, labels)
        draw = self.mixup_fn.draw(labels, ids=ids)
        module, compiled = self._find(self.layer)

        def mix(output: Any) -> Tensor:
            mixed = self._mixed(draw, output, labels)
            if not ops.in_backward():
                tell(mixed, draw.target.num_mixed)
            return mixed

        mixing = _Mixing(self.model, module, mix)
        with mixing, torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            logits = self._forward(x, 0, labels)
        if not mixing.calls:
            raise RuntimeError(f"layers must run in the model's forward, but {self.layer!r} did not")
        mixing.follow(logits)
        return logits, draw.target

    def _find(self, layer: str) -> tuple[nn.Module, bool]:
        """The module of a name, and whether it lies within a compiled one."""
        modules, parts = _modules(self.model), layer.split(".")
        above = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
        module = modules[layer]
        return module, any(map(_is_wrapper, above)) or any(map(_is_compiled, [*above, module]))

    def _mixed(self, draw: Draw, output: Any, labels: Tensor) -> Tensor:
        name = f"the output of layer {self.layer!r}"
        checks.tensor(name, output)
        checks.dtype(name, output, checks.LOGITS_DTYPES)
        if output.dim() == 0 or output.shape[0] != labels.shape[0]:
            raise ValueError(f"{name} must have {labels.shape[0]} rows, as labels have, got {tuple(output.shape)}")
        checks.same_device(name, output, "labels", labels)
        return self.mixup_fn.apply(draw, output)

    def _forward(self, x: Tensor | Sequence | Mapping, num_mixed: int, labels: Tensor) -> Any:
        with telling(labels, num_mixed):
            if isinstance(x, Mapping):
                return self.model(**x)
            return self.model(*x) if isinstance(x, (tuple, list)) else self.model(x)
