"""The loss over the rows and the classes of several ranks: what callers name, as the operators take it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..conventions import wide_dtype
from ..ops import LossArguments, is_transformed, reference
from ..ops.ranks import ClassShard, Ranks, RowsOverRanks
from ..target import MixedTarget, parse
from .options import LossParts


@dataclass(frozen=True)
class ClassShards:
    """How the classes of logits are divided over ranks, each of which has (N, own) of (N, C) logits.

    Rank r of R has the classes that :func:`torch.chunk` gives it, as of a DTensor of placement ``Shard(-1)``: ceil(C / R) from
    r·ceil(C / R) on, and the last ranks fewer, if need be none.

    Args:
        num_classes: C, of all ranks.
        process_group: the ranks; all of them if None.
        first: this rank's first class, where the classes are divided in another way; each belongs to one rank.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.
    """

    num_classes: int
    process_group: Any = None
    first: int | None = None

    def __post_init__(self) -> None:
        checks.positive_int("num_classes", self.num_classes)
        if self.process_group is not None:
            check_group(self.process_group)
        if self.first is not None:
            checks.integer("first", self.first, 0)

    def of(self, own: int, name: str = "logits") -> ClassShard:
        """The shard of a rank that has logits of ``own`` classes."""
        group = dist.group.WORLD if self.process_group is None else self.process_group
        if group is None:
            raise ValueError("class_shards must be used after torch.distributed.init_process_group")
        each = -(-self.num_classes // dist.get_world_size(group))
        first = min(each * dist.get_rank(group), self.num_classes) if self.first is None else self.first
        expected = min(each, self.num_classes - first) if self.first is None else own
        if first + own > self.num_classes and self.first is not None:
            raise ValueError(
                f"{name} must have at most {max(self.num_classes - first, 0)} of the {self.num_classes} classes with "
                f"first={first}, got {own}"
            )
        if own != expected:
            raise ValueError(
                f"{name} must have {expected} of the {self.num_classes} classes on rank {dist.get_rank(group)}, as "
                f"torch.chunk divides them, or class_shards must say first; got {own} from {first} on"
            )
        return ClassShard(group, first, own, self.num_classes)


def check_group(group: Any) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


class Over(NamedTuple):
    """What a call of the loss said of ranks; each may be None."""

    process_group: Any = None
    class_shards: ClassShards | None = None
    step: "StepRows | None" = None

    def check(self) -> "Over":
        if self.process_group is not None:
            check_group(self.process_group)
        if self.class_shards is not None and not isinstance(self.class_shards, ClassShards):
            raise TypeError(f"class_shards must be ClassShards or None, got {type(self.class_shards).__name__}")
        if self.step is not None and not isinstance(self.step, StepRows):
            raise TypeError(f"step must be StepRows or None, got {type(self.step).__name__}")
        return self

    def ranks(self, logits: Tensor, target: Any, class_dim: int) -> tuple[Tensor, Any, Ranks | None]:
        """This rank's logits and target, and the ranks; None if no other has any."""
        logits, target, shard = localized(logits, target, self.class_shards, class_dim)
        return logits, target, self.with_shard(shard, logits)

    def with_shard(self, shard: ClassShard | None, like: Tensor) -> Ranks | None:
        merge: Any = self.step
        if merge is None and self.process_group is not None:
            merge = RowsOverRanks(self.process_group)
        if merge is None and shard is None:
            return None
        if is_transformed(like):
            raise ValueError("process_group and class_shards must be None under a transform of torch.func")
        return Ranks(merge, shard)


def is_dtensor(value: Any) -> bool:
    """Without importing what defines it, which takes a while: a DTensor is made by whoever did."""
    return type(value).__name__ == "DTensor" and hasattr(value, "device_mesh")


def _of_mesh(value: Any, name: str, dim: int) -> tuple[Tensor, Any]:
    """(local part, process group) of a DTensor that one dimension of its mesh divides, along ``dim``; others hold copies."""
    sharded = [i for i, placement in enumerate(value.placements) if placement.is_shard()]
    other = [p for p in value.placements if not p.is_replicate() and not p.is_shard(dim % value.dim())]
    if len(sharded) != 1 or other:
        raise ValueError(
            f"{name} must be divided by Shard({dim}) along one dimension of its mesh, and no other, got {value.placements}"
        )
    return value.to_local(grad_placements=value.placements), value.device_mesh.get_group(sharded[0])


def localized(
    logits: Tensor, target: Any, shards: ClassShards | None, class_dim: int, name: str = "logits", dim: int = -1
) -> tuple[Tensor, Any, ClassShard | None]:
    """(the local logits, the target that goes with them, the shard): DTensors unwrapped, dense labels cut to the own classes."""
    if is_dtensor(logits):
        classes = logits.shape[dim]
        logits, group = _of_mesh(logits, name, dim)
        if shards is None:
            shards = ClassShards(classes, group)
    if shards is None:
        return logits, target, None
    checks.tensor(name, logits)
    if class_dim not in (-1, logits.dim() - 1):
        raise ValueError(f"class_dim must be -1 where ranks have classes of their own, got {class_dim}")
    shard = shards.of(logits.shape[dim] if logits.dim() else 0, name)

    def own(labels: Any) -> Any:
        if is_dtensor(labels):
            labels = labels.to_local()
        if isinstance(labels, Tensor):
            if labels.requires_grad and torch.is_grad_enabled():
                raise ValueError("target must not require a gradient where ranks have classes of their own")
            if labels.is_floating_point() and labels.dim() > 1 and labels.shape[-1] == shard.classes:
                return labels[..., shard.first : shard.first + shard.own]
        return labels

    if isinstance(target, tuple | list):
        parts = map(own, target)
        return logits, (MixedTarget._make(parts) if isinstance(target, MixedTarget) else tuple(parts)), shard
    return logits, own(target), shard


def _counts(target: MixedTarget, class_dim: int) -> Tensor:
    """(3,) float64: the rows of L_mix, L_clean and R that a target has, without those ignored."""
    if not isinstance(target, MixedTarget):
        raise TypeError(f"targets must be MixedTargets, got {type(target).__name__}")
    labels, lam = target.labels, target.lam
    shape = labels.shape if labels.is_floating_point() else (*labels.shape, 1)
    if not labels.is_floating_point():
        class_dim = -1
    parsed = parse(lam.new_empty(()).expand(shape), target, class_dim)
    kept = reference.kept_labels(parsed.target, parsed.rows[:, 0]).detach()
    of_r = kept[len(kept) - parsed.num_reg :] == 1
    sums = kept[: parsed.num_mixed].sum(), kept[parsed.num_mixed :].sum(), of_r.sum()
    return torch.stack([value.to(wide_dtype(lam.device)) for value in sums])


class StepRows:
    """The rows of a whole optimizer's step: of all its micro-batches, on all ranks. The loss divides by their number.

    A micro-batch's mean over its own rows would weigh rows by the size of the micro-batch, and its η̂ would be its own. With
    ``step=`` the loss of a micro-batch is its share of the step's L₀ + η R, without η̂, which is known when the last one is:
    :meth:`finish` then multiplies the gradients by it. Of the mean over ranks, and summed over micro-batches, the shares are
    L₀ + η R. Two collectives a step, of three numbers each: the first is under way during the forward, the second during the
    last backward. Use one for each step.

    Args:
        targets: the :class:`MixedTarget` of each micro-batch of this rank. Ranks may have different numbers of them.
        process_group: the ranks; only this process if None.
        class_dim: as the loss's, for soft labels.

    Raises:
        TypeError: if targets are not MixedTargets, or ``process_group`` is none.
        ValueError: for no targets.

    Example:
        >>> batches = [mixup_fn(x, labels) for x, labels in micro_batches]
        >>> step = mixupe_kernels.StepRows([target for _, target in batches], process_group=group)
        >>> for x, target in batches:
        ...     criterion(model(x), target, step=step).backward()  # under no_sync() but for the last
        >>> loss = step.finish(model.parameters())
    """

    def __init__(self, targets: Iterable[MixedTarget], *, process_group: Any = None, class_dim: int = -1):
        if process_group is not None:
            check_group(process_group)
        if not isinstance(targets, Iterable) or isinstance(targets, Tensor):
            raise TypeError(f"targets must be MixedTargets, got {type(targets).__name__}")
        checks.integer("class_dim", class_dim)
        counts = [_counts(target, class_dim) for target in targets]
        if not counts:
            raise ValueError("targets must hold at least one MixedTarget, got none")
        self._begin(torch.stack(counts).sum(0), len(counts), process_group)
        self._counted = self._reduce(self._rows)

    @classmethod
    def counted(cls, rows: Tensor, micro_batches: int, *, process_group: Any = None) -> "StepRows":
        """The same from numbers: (3,) rows of L_mix, L_clean and R of the whole step, on all ranks, which were counted elsewhere."""
        checks.tensor("rows", rows)
        checks.shape("rows", rows, (3,))
        if process_group is not None:
            check_group(process_group)
        made = cls.__new__(cls)
        made._begin(
            rows.to(wide_dtype(rows.device)), checks.positive_int("micro_batches", micro_batches), process_group
        )
        made._counted = None
        return made

    def _begin(self, rows: Tensor, micro_batches: int, group: Any) -> None:
        self._rows, self._left, self._group = rows, micro_batches, group
        self._sums = torch.zeros_like(rows)
        self._summed: Any = None
        self._arguments: LossArguments | None = None
        self.last: LossParts | None = None

    def _reduce(self, values: Tensor) -> Any:
        return None if self._group is None else dist.all_reduce(values, group=self._group, async_op=True)

    @property
    def rows(self) -> Tensor:
        """(3,) float64: the rows of L_mix, of L_clean and of R, of the whole step."""
        if self._counted is not None:
            self._counted.wait()
            self._counted = None
        return self._rows

    def factor(self) -> int:
        """What the gradient is multiplied by: DistributedDataParallel and FSDP take the mean of the ranks' gradients."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    def share_of(self, arguments: LossArguments) -> LossArguments:
        """The arguments of a micro-batch's share: without η̂."""
        if self._left == 0:
            raise RuntimeError("step must be used for as many micro-batches as it was made of, got one more")
        self._arguments = arguments._replace(eta=arguments.eta.clone())
        return arguments._replace(rescale=False)

    def __call__(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        terms = torch.stack(sums[:3])
        self._sums += terms.detach()
        self._left -= 1
        if self._left == 0:
            self._summed = self._reduce(self._sums)
        return *(terms * self.factor()).unbind(), *self.rows.to(terms.dtype).unbind()

    def finish(self, parameters: Iterable[nn.Parameter] = ()) -> Tensor:
        """After the last backward: multiply the ``parameters``' gradients by η̂ of the step, and return the step's loss.

        :attr:`last` holds its ``mix_loss``, ``clean_loss``, ``reg`` and ``eta_hat`` then. Nothing waits for a device.

        Raises:
            RuntimeError: before the loss of the last micro-batch, or the second time.
        """
        if self._left or self._arguments is None:
            why = f"{self._left} micro-batches are left" if self._left else "it is finished already"
            raise RuntimeError(f"step must be finished once, after the loss of all its micro-batches: {why}")
        if self._summed is not None:
            self._summed.wait()
            self._summed = None
        arguments, self._arguments = self._arguments, None
        sums = torch.cat([self._sums, self.rows]).to(arguments.eta.dtype).unbind()
        loss, parts = reference.loss_of_sums(sums, arguments)
        self.last = LossParts(*parts[:4].unbind())
        for parameter in parameters:
            grad: Any = parameter.grad
            if grad is not None:
                local = grad.to_local() if is_dtensor(grad) else grad
                local.mul_(self.last.eta_hat.to(local.device, local.dtype))
        return loss
