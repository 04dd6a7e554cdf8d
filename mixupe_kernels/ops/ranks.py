"""What ranks tell each other of their rows and of their classes: one collective each, by torch.distributed.

Rows over ranks: the loss is made of six sums, so that the loss of all ranks' rows is that of the summed sums. Classes over
ranks: each rank has the CE, H and lse of its own classes, and a row's are merged from those as a thread's are in row.h.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..conventions import IGNORE_INDEX, accumulate_dtype, wide_dtype
from . import losses, reference
from .arguments import LossArguments, RowGradients, RowOptions, RowOutputs, RowTarget
from .registration import below_autograd


def all_gather(mine: Tensor, group: Any) -> Tensor:
    """The tensor of every rank, (R, ...), in their order, by one collective."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13
    everyones = mine.new_empty((dist.get_world_size(group), *mine.shape))
    gather(everyones.view(-1), mine.view(-1), group=group)
    return everyones


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, *of):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "a loss over ranks that have classes, or rows of the linear loss, has no second derivative, nor has "
            "a SyncBatchNorm that normalises mixed and clean rows apart"
        )


def once(gradients: tuple[Tensor | None, ...], of: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients in a graph whose second derivative in any of ``of`` raises.

    What ``once_differentiable`` returns is a function of nothing: ``torch.autograd.grad`` would leave its part out and not say so.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return tuple(None if gradient is None else _Once.apply(gradient.detach(), *of) for gradient in gradients)


# Rows over ranks ---------------------------------------------------------------------------------------------------------


class _SumOverRanks(torch.autograd.Function):
    """Σ over the ranks of each number, by one all-reduce in float64; no collective in the backward.

    Every rank has the same loss of the sums, and its gradient with respect to a rank's own term is that of the sum. It is
    multiplied by the number of ranks, for DistributedDataParallel and FSDP take the mean of the ranks' gradients.
    """

    @staticmethod
    def forward(ctx, terms, group):
        ctx.ranks = dist.get_world_size(group)
        summed = terms.to(wide_dtype(terms.device), copy=True)
        dist.all_reduce(summed, group=group)
        return summed.to(terms.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.ranks, None


class RowsOverRanks(NamedTuple):
    """Sums over the rows of all ranks of ``group``, as ``reference.loss_of_rows`` merges them."""

    group: Any

    def __call__(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _SumOverRanks.apply(torch.stack(sums), self.group).unbind()

    def factor(self) -> int:
        """What the gradient of the loss is multiplied by."""
        return dist.get_world_size(self.group)


class _LossOverRanks(losses._FusedLoss):
    """The loss of all ranks' rows, with one kernel for each row's terms and one for the gradient, as the fused loss has."""

    @staticmethod
    def forward(ctx, logits, target, arguments, parts, merge):  # type: ignore[override]
        outputs = RowOutputs(*below_autograd(losses.ce_entropy_op, logits, *target, *arguments.of_rows()))
        loss, of_loss, signed_entropy = reference.penalized(outputs, target, arguments, merge)
        ctx.save_for_backward(logits, *target, of_loss, signed_entropy, outputs.lse)
        ctx.options, ctx.factor = arguments.of_backward(), merge.factor()
        parts.append(of_loss)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *losses._FusedLoss.backward(ctx, grad * ctx.factor), None


def fused_loss(logits: Tensor, target: RowTarget, arguments: LossArguments, merge: Any) -> tuple[Tensor, Tensor]:
    """(loss, parts) of all ranks' rows, of a target that is a constant; ``merge`` is of the six sums over this rank's."""
    arguments.check(logits)
    parts: list[Tensor] = []
    return _LossOverRanks.apply(logits, target, arguments, parts, merge), parts[0]


# Classes over ranks ------------------------------------------------------------------------------------------------------


class OfClasses(NamedTuple):
    """Of some of a row's classes: what ``RowOutputs`` says of them alone, and Σy, the share of the target they have.

    (N,) each. The merge over the ranks of lse_r, H_r, CE_r and Y_r, with w_r = e^{lse_r - lse} the probability of a rank's classes:
    lse = log Σ e^{lse_r},  H = Σ w_r (H_r - log w_r),  CE = Σ CE_r + Y_r (lse - lse_r).
    """

    ce: Tensor
    entropy: Tensor
    lse: Tensor
    mass: Tensor


def merge_classes(of: OfClasses, sigmoid: bool) -> OfClasses:
    """The statistics of all classes from those of each rank's, (R, N) each, in the order of the ranks."""
    if sigmoid:
        return OfClasses(*(value.sum(0) for value in of))
    lse = of.lse.logsumexp(0)
    less = lse - of.lse  # ∞ where a rank has no class of a finite logit
    weight = torch.exp(-less)
    entropy = reference.zero_where(weight == 0, weight * (of.entropy + less)).sum(0)
    ce = (of.ce + reference.zero_where(of.mass == 0, of.mass * less)).sum(0)
    return OfClasses(ce, entropy, lse, of.mass.sum(0))


def own_gradients(grads: RowGradients, own: OfClasses, merged: OfClasses, sigmoid: bool) -> RowGradients:
    """The gradients with respect to this rank's CE, H and lse from those of the merged ones: no other rank is asked."""
    if sigmoid:
        return grads
    g_ce, g_entropy, g_lse = (torch.zeros_like(own.lse) if grad is None else grad for grad in grads)
    less = merged.lse - own.lse
    weight = torch.exp(-less)
    absent = weight == 0
    of_weight = g_lse + g_ce * merged.mass
    of_entropy = reference.zero_where(absent, weight * (own.entropy + less - merged.entropy))
    of_lse = weight * of_weight - g_ce * own.mass + g_entropy * of_entropy
    return RowGradients(g_ce, g_entropy * weight, of_lse)


class ClassShard(NamedTuple):
    """The classes [first, first + own) of ``classes`` that this rank of ``group`` has the logits of."""

    group: Any
    first: int
    own: int
    classes: int

    def gather(self, own: OfClasses) -> OfClasses:
        """Every rank's statistics, (R, N) each, by one all-gather of four floats a row."""
        return OfClasses(*all_gather(torch.stack(own), self.group).unbind(1))

    def target_of(self, target: RowTarget, options: RowOptions) -> RowTarget:
        """The target of the own classes: dense labels are theirs already, and other classes' labels are ignored."""
        if target.is_dense():
            labels, smoothing = target.labels, options.label_smoothing
            return RowTarget(labels * (1 - smoothing) + smoothing / self.classes if smoothing else labels)
        target.check_values(self.classes, options.ignore_index)

        def within(labels: Tensor) -> Tensor:
            mine = (labels >= self.first) & (labels < self.first + self.own) & (labels != options.ignore_index)
            return torch.where(mine, labels - self.first, IGNORE_INDEX)

        labels, partner_labels, lam = target
        return RowTarget(within(labels), None if partner_labels is None else within(partner_labels), lam)

    def statistics(self, logits: Tensor, target: RowTarget, options: RowOptions) -> OfClasses:
        """CE, H, lse and Σy of the own classes alone, of ``logits`` (N, own), differentiable in them.

        A row whose own logits are all -∞ has lse -∞ here, and adds nothing.
        """
        weights, smoothing = options.class_weight, 0.0 if target.is_dense() else options.label_smoothing
        own_target = self.target_of(target, options)
        if self.own == 0:  # more ranks than classes need: nothing, but with a gradient, as on other ranks
            nothing = logits.sum(1, dtype=accumulate_dtype(logits.dtype))
            return OfClasses(nothing, nothing, nothing - (0 if options.sigmoid else torch.inf), nothing.detach())
        if not options.sigmoid:
            absent = logits.detach().amax(1) == -torch.inf
            logits = _ZeroGradientOf.apply(logits, absent)
        ce, entropy, lse = losses.ce_entropy(logits, own_target, RowOptions(weights, sigmoid=options.sigmoid))
        mass = _mass(own_target, weights, lse)
        if smoothing:  # a second pass over the logits, for the part of a smoothed label that every class has
            even = losses.ce_entropy(logits, RowTarget(torch.zeros_like(target.labels)), RowOptions(weights, 1.0)).ce
            kept = _mass(target.map(lambda part: _ignored(part, options.ignore_index)), None, lse)
            each = smoothing * (self.own if weights is None else weights.sum()) / self.classes
            ce = ce * (1 - smoothing) + kept * even * (smoothing * self.own / self.classes)
            mass = mass * (1 - smoothing) + kept * each
        if not options.sigmoid:
            ce, entropy = reference.zero_where(absent, ce), reference.zero_where(absent, entropy)
            lse = torch.where(absent, -torch.inf, lse)
        return OfClasses(ce, entropy, lse, mass)


def _ignored(part: Tensor, ignore_index: int) -> Tensor:
    """Labels with -100 in the place of ``ignore_index``; λ as it is."""
    return part if part.is_floating_point() else torch.where(part == ignore_index, IGNORE_INDEX, part)


def _mass(target: RowTarget, class_weight: Tensor | None, like: Tensor) -> Tensor:
    """Σy of each row over the classes of the target, (N,)."""
    if target.is_dense():
        labels = target.labels.detach()
        return labels.sum(1) if class_weight is None else labels @ class_weight

    def share(labels: Tensor) -> Tensor:
        kept = labels != IGNORE_INDEX
        if class_weight is None:
            return kept.to(like.dtype)
        return kept * class_weight[labels.where(kept, 0)]

    if target.partner_labels is None or target.lam is None:
        return share(target.labels)
    lam = target.lam.detach()
    return lam * share(target.labels) + (1 - lam) * share(target.partner_labels)


class _ZeroGradientOf(torch.autograd.Function):
    """The logits as they are; the gradient of the rows ``absent``, which would be NaN, is 0."""

    @staticmethod
    def forward(ctx, logits, absent):
        ctx.save_for_backward(absent)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        (absent,) = ctx.saved_tensors
        if absent.is_cpu and not bool(absent.any()):
            return grad, None
        return grad.masked_fill(absent.unsqueeze(1), 0), None


class _MergeClasses(torch.autograd.Function):
    """(CE, H, lse, Σy) of all classes from the own classes'. The gradient is the own classes', of the same loss on each rank."""

    @staticmethod
    def forward(ctx, shard, sigmoid, *own):
        merged = merge_classes(shard.gather(OfClasses(*own)), sigmoid)
        ctx.save_for_backward(*own, *merged)
        ctx.sigmoid = sigmoid
        ctx.mark_non_differentiable(merged.mass)
        ctx.set_materialize_grads(False)
        return tuple(merged)

    @staticmethod
    def backward(ctx, grad_ce, grad_entropy, grad_lse, _):
        saved = ctx.saved_tensors
        grads = RowGradients(grad_ce, grad_entropy, grad_lse)
        with torch.no_grad():
            found = own_gradients(grads, OfClasses(*saved[:4]), OfClasses(*saved[4:]), ctx.sigmoid)
        return None, None, *once(found, (grad_ce, grad_entropy, grad_lse, *saved[:4])), None


def merged(own: OfClasses, target: RowTarget, sigmoid: bool, shard: ClassShard) -> tuple[RowOutputs, RowTarget]:
    """The outputs of whole rows from the own classes' statistics, by one collective, and the target that goes with them.

    That target has the mass and the ignored labels of ``target``, and is smoothed: what follows takes a ``label_smoothing`` of 0.
    """
    of_all = OfClasses(*_MergeClasses.apply(shard, sigmoid, *own))
    outputs = RowOutputs(of_all.ce, of_all.entropy, of_all.lse)
    if not target.is_dense():
        return outputs, target
    share = target.lam
    if share is not None:
        outputs = outputs._replace(ce=reference.zero_where(share == 0, outputs.ce * share))
    return outputs, RowTarget(of_all.mass.unsqueeze(1), None, share)


def ce_entropy(
    logits: Tensor, target: RowTarget, options: RowOptions, shard: ClassShard
) -> tuple[RowOutputs, RowTarget]:
    """CE, H and lse of each row from this rank's logits (N, own) of its classes: the same bits on every rank.

    ``target`` has classes in [0, ``shard.classes``), or dense labels of the own classes. One collective; none in the backward.
    """
    return merged(shard.statistics(logits, target, options), target, options.sigmoid, shard)


class Ranks(NamedTuple):
    """How a loss is made over ranks: ``merge`` of the sums over its rows, and the ``shard`` of the classes that is here."""

    merge: Callable | None = None
    shard: ClassShard | None = None

    def outputs(
        self, logits: Tensor, target: RowTarget, arguments: LossArguments
    ) -> tuple[RowOutputs, RowTarget, LossArguments]:
        """CE, H and lse of each row, and the target and arguments that go with them from here on."""
        options = arguments.of_rows()
        if self.shard is None:
            return losses.ce_entropy(logits, target, options), target, arguments
        outputs, target = ce_entropy(logits, target, options, self.shard)
        return outputs, target, arguments._replace(label_smoothing=0.0)


ALONE = Ranks()
