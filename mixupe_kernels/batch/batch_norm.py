"""BatchNorm for a batch of two kinds of rows: mixed and clean rows are normalised apart, in one call of the model."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks, ops
from ..ops.normalising_ranks import batch_norm_over_ranks
from ..target import MixedTarget


class _Told(threading.local):
    """What the current call of a model was told: None, or a tensor of shape (mixed rows, all rows, 0).

    A shape, because torch.compile takes a changing shape as dynamic; each change of an int is another graph. A thread's
    own, because two threads may train two models.
    """

    def __init__(self):
        self.rows: Tensor | None = None


_told = _Told()


def tell(x: Tensor, num_mixed: int) -> None:
    """Say that the first ``num_mixed`` rows of x are mixed, until :func:`telling` ends."""
    _told.rows = torch.empty((num_mixed, x.shape[0], 0), device=x.device)


@contextmanager
def telling(x: Tensor, num_mixed: int) -> Iterator[None]:
    """Tell every converted layer that runs in this thread within the block which rows of x are mixed."""
    before = _told.rows
    tell(x, num_mixed)
    try:
        yield
    finally:
        _told.rows = before


class SplitBatchNorm(_BatchNorm):
    """What :func:`split_batch_norm` mixes into the class of a layer: ``SplitBatchNorm2d`` is this and BatchNorm2d."""

    original: type[_BatchNorm]
    synchronised = False  # over ranks, as SyncBatchNorm

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        eager = not torch.compiler.is_compiling()
        mixed = 0
        if _told.rows is not None:
            mixed = _mixed_rows(_told.rows, x)
            if eager:
                self._told_before[x.shape[0]] = mixed
        elif eager and ops.in_backward() and x.shape[0] in self._told_before:
            # A checkpointed block, whose first run has moved the running statistics.
            return self._finish(self._normalise(x, self._told_before[x.shape[0]], *self._scratch(), 1.0))
        elif torch.is_grad_enabled():
            raise RuntimeError(
                "a model converted by split_batch_norm must be told in training which rows are mixed: write "
                "forward_mixupe(model, x, target) instead of model(x), with None for target if all rows are clean; "
                "only under torch.no_grad(), as in update_bn, does model(x) take all rows for clean"
            )
        over_ranks = self.synchronised and self._ranks() is not None
        if mixed in (0, x.shape[0]) and not over_ranks:
            return super().forward(x)
        self._check_input_dim(x)
        for kind, rows in (("mixed", mixed), ("clean", x.shape[0] - mixed)):
            if rows * x.shape[2:].numel() == 1 and not over_ranks:
                raise ValueError(
                    f"a layer converted by split_batch_norm must see more than 1 value per channel of each kind of rows "
                    f"in training, got 1 {kind} row of shape {tuple(x.shape[1:])}"
                )
        return self._finish(self._tracked(x, mixed))

    def _tracked(self, x: Tensor, mixed: int) -> Tensor:
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.track_running_stats or running_mean is None or running_var is None:
            return self._normalise(x, mixed, None, None, 0.0)
        if batches is not None:
            batches.add_(1)
        if self.momentum is not None:
            return self._normalise(x, mixed, running_mean, running_var, self.momentum)
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        out = self._normalise(x, mixed, mean, var, 1.0)
        if batches is not None:  # the mean over batches, whose number stays on the device
            weight = batches.reciprocal().to(mean.dtype)
            running_mean.lerp_(mean, weight)
            running_var.lerp_(var, weight)
        return out

    def _scratch(self) -> tuple[Tensor | None, Tensor | None]:
        """Buffers that take the statistics of one batch, with momentum 1, in place of the running ones."""
        if self.running_mean is None or self.running_var is None:
            return None, None
        return torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)

    def _normalise(self, x: Tensor, mixed: int, mean: Tensor | None, var: Tensor | None, momentum: float) -> Tensor:
        layer = ops.NormLayer(self.weight, self.bias, mean, var, momentum, self.eps)
        ranks = self._ranks() if self.synchronised else None
        if ranks is not None:
            return batch_norm_over_ranks(x, mixed, layer, ranks)
        return layer.normalise(x) if mixed in (0, x.shape[0]) else ops.batch_norm_apart(x, mixed, layer)

    def _ranks(self) -> Any:
        """The process group whose rows a ``synchronised`` layer normalises together; None if it is alone in it."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = getattr(self, "process_group", None) or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _finish(self, x: Tensor) -> Tensor:
        """What the layer's class does after the normalisation."""
        return x

    @functools.cached_property
    def _told_before(self) -> dict[int, int]:
        """Of so many rows, how many were mixed in the last call: a checkpointed block is recomputed untold."""
        return {}

    def __reduce_ex__(self, protocol):
        _, arguments, *state = tuple(super().__reduce_ex__(max(protocol, 2)))
        return _new, (self.original, *arguments[1:]), *state


def _mixed_rows(told: Tensor, x: Tensor) -> int:
    """How many rows of a layer's input are mixed; a layer may see each row of the batch as several."""
    num_mixed, rows = told.shape[:2]
    if x.shape[0] == rows:
        return num_mixed
    if rows == 0 or x.shape[0] % rows:
        raise ValueError(
            f"a layer converted by split_batch_norm must see the {rows} rows that forward_mixupe was given, or a "
            f"multiple of them, got {x.shape[0]} rows"
        )
    return num_mixed * (x.shape[0] // rows)


def _activated(self: Any, x: Tensor) -> Tensor:
    return self.act(self.drop(x))


# Layers with a forward of their own: what it does after the normalisation.
_FINISH: dict[str, Callable[[Any, Tensor], Tensor]] = {"timm.layers.norm_act.BatchNormAct2d": _activated}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _definer(cls: type) -> type:
    """The class that ``cls`` has its forward of."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


@functools.cache
def _split_class(cls: type[_BatchNorm]) -> type[SplitBatchNorm]:
    contents: dict[str, Any] = {"original": cls, "__module__": __name__, "__doc__": SplitBatchNorm.__doc__}
    becomes = getattr(cls, "cls_to_become", None)
    if isinstance(becomes, type):  # a lazy layer changes its class in its first call
        contents["cls_to_become"] = _split_class(becomes)
    if issubclass(cls, nn.SyncBatchNorm):
        contents["synchronised"] = True
    finish = _FINISH.get(_name(_definer(cls)))
    if finish is not None:
        contents["_finish"] = finish
    return type(f"Split{cls.__name__}", (SplitBatchNorm, cls), contents)


def _new(original: type, *arguments) -> SplitBatchNorm:
    cls = _split_class(original)
    return cls.__new__(cls, *arguments)


def _check_layer(name: str, layer: _BatchNorm) -> None:
    where = f"model must have layers that split_batch_norm can convert, got {name!r}, a {_name(type(layer))}"
    definer = _definer(type(layer))
    if definer not in (_BatchNorm, nn.SyncBatchNorm) and _name(definer) not in _FINISH:
        raise TypeError(f"{where}, whose forward is its own: make it a BatchNorm and what follows")
    if "forward" in vars(layer):
        raise TypeError(f"{where}, whose forward was replaced: convert the model before it is wrapped")


def split_batch_norm(model: nn.Module) -> nn.Module:
    """Let every BatchNorm of the model normalise mixed rows and clean rows apart, in training, without a second call.

    Mixed inputs vary less than clean ones, by the factor 1 - w of MixupE's eq. 7 (2/3 for α = 1), so that statistics of
    mixed rows are wrong for the clean inputs of evaluation. Statistics of a domain's own are known from semi-supervised
    learning (Zając et al., 2019, "Split batch normalization") and from AdvProp (Xie et al., 2020).

    In training, with the rows that :func:`forward_mixupe` tells of:

    - mixed rows are normalised by the mean and variance of the mixed rows, clean rows by those of the clean rows;
    - running statistics follow the clean rows, one update a step, also where a checkpointed block is recomputed;
    - rows of one kind alone, all clean or all mixed, are normalised and tracked as by BatchNorm. So :class:`Mixup`,
      ``regularize="mixed"`` and the batches between two of ``interval`` move the running statistics by mixed rows:
      run :func:`torch.optim.swa_utils.update_bn` on plain samples after training;
    - ``model(x)`` alone raises, except under ``torch.no_grad()``, as in ``update_bn``, where all rows count as clean.

    In evaluation, and where a layer alone is in evaluation mode, a layer is the BatchNorm that it was.

    A layer changes its class and nothing else: parameters, buffers, hooks and names stay, so optimizers and state_dicts of
    the model as it was fit. No activation is copied; off the CPU, backward joins the two gradients, which is a pass over
    them. The layers know their rows also in threads, in compiled models, and in blocks that a checkpoint recomputes, with
    two limits: compile the model as a whole, not a block within a checkpoint; and let no two batches of as many rows, but
    of another number of mixed ones, await their backward together.

    Args:
        model: changed in place. Its BatchNorm1d, 2d and 3d, lazy ones, subclasses that keep their forward, timm's
            BatchNormAct2d and SyncBatchNorm are converted. ``convert_sync_batchnorm`` comes first: it would replace the
            layers. Each kind of rows then has the statistics of all ranks' rows of that kind, by one collective in the
            forward and one in the backward, on the CPU, too; every rank calls, whatever rows it has.

    Returns:
        The model.

    Raises:
        TypeError: if ``model`` is not a Module, or has another BatchNorm with a forward of its own; nothing is changed then.

    Example:
        >>> model = mixupe_kernels.split_batch_norm(model)
        >>> x, target = mixup_fn(x, labels)
        >>> logits = mixupe_kernels.forward_mixupe(model, x, target)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SplitBatchNorm)
    ]
    for name, layer in layers:
        _check_layer(name, layer)
    for _, layer in layers:
        original: type = type(layer)
        layer.__class__ = _split_class(original)
    return model


def forward_mixupe(
    model: Callable[[Tensor], Tensor], x: Tensor, target: MixedTarget | None, *, batched: bool = True
) -> Tensor:
    """Logits of all rows, with the layers of :func:`split_batch_norm` told which rows are mixed.

    For a model that treats rows separately this is ``model(x)``. BatchNorm in training mode does not:

    ================================  =================================  =============================================
    form                              rows are normalised                running statistics follow
    ================================  =================================  =============================================
    after :func:`split_batch_norm`    each kind by its own               clean rows, one update a step
    BatchNorm, one call               all by those of all rows           all rows, one update a step
    ``batched=False``                 each kind by its own               mixed rows, then clean rows: two updates of
                                                                         momentum m, which weigh m(1 - m) and m
    ================================  =================================  =============================================

    The last is what the authors' public code does, at the cost of two calls; a converted model does the same then. Mixed rows
    vary less than clean ones, so the running variance is too small in all but the first. Dropout draws the same number of
    masks, in another order.

    Args:
        model: from (n, ...) to (n, C), or any output that can be concatenated along its first dimension.
        x: (N, ...) as :class:`MixupE` returns it: ``target.num_mixed`` mixed rows, then clean rows.
        target: the target that came with it; None if all rows are clean.
        batched: one call; False makes two, if there are rows of both kinds.

    Returns:
        (N, C) logits for :class:`MixupELoss` with the same target.

    Raises:
        TypeError, ValueError: if ``target`` is not a MixedTarget, or has another number of rows than ``x``; if ``model`` is
            a converted one in a DataParallel over several devices, whose replicas do not know which rows they have.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    checks.tensor("x", x)
    checks.boolean("batched", batched)
    if target is not None:
        if not isinstance(target, MixedTarget):
            raise TypeError(f"target must be a MixedTarget or None, got {type(target).__name__}")
        checks.shape("x", x, (target.labels.shape[0], *x.shape[1:]))
    if (
        isinstance(model, nn.DataParallel)
        and len(model.device_ids) > 1
        and any(isinstance(layer, SplitBatchNorm) for layer in model.modules())
    ):
        raise TypeError(
            "model must be a DistributedDataParallel, not a DataParallel over several devices, after split_batch_norm"
        )
    num_mixed = 0 if target is None else target.num_mixed
    if batched or num_mixed in (0, x.shape[0]):
        with telling(x, num_mixed):
            return model(x)
    mixed, clean = x[:num_mixed], x[num_mixed:]
    with telling(mixed, num_mixed):
        mixed = model(mixed)
    with telling(clean, 0):
        return torch.cat([mixed, model(clean)])
