"""The batch the model sees: mixed rows first, clean rows after them, in one tensor with one target.

``MixupE`` draws λ and partners, mixes, and appends the clean rows that the regularizer is taken on; ``Mixup`` is the
same without clean rows. Both stand where ``timm.data.Mixup`` or ``torchvision.transforms.v2.MixUp`` stand in a loop.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, ops, reference, sampling


class MixedTarget(NamedTuple):
    """The target of a batch of N rows: two labels a row and the weight of the first. A pytree.

    The first ``num_mixed`` rows carry the mixup loss and the last ``num_reg`` carry the regularizer. A clean row has its
    own label twice and λ = 1.

    Attributes:
        labels: (N,) int64 classes, or (N, C) soft labels, of the rows' own samples.
        partner_labels: the same, of the samples they are mixed with.
        lam: (N,) float32 in [0, 1], the weight of the own sample.
        num_mixed: rows of the mixup loss.
        num_reg: rows of the regularizer.
        reg_weight: the regularizer's weight w (MixupE, eq. 7): a float or a 0-d tensor.
    """

    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    num_mixed: int
    num_reg: int
    reg_weight: Tensor | float

    def to(self, *args, **kwargs) -> "MixedTarget":
        """Every tensor moved as by :meth:`torch.Tensor.to`; a dtype applies to the floating-point ones."""

        def move(value):
            if not isinstance(value, Tensor):
                return value
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            if dtype is None or not value.is_floating_point():
                dtype = value.dtype
            return value.to(device or value.device, dtype, non_blocking=non_blocking)

        return MixedTarget(*map(move, self))

    def dense(self, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
        """The targets λ·y + (1 - λ)·y_partner as (N, num_classes) float32 (mixup, eq. 1), labels smoothed before.

        Raises:
            ValueError: if soft labels do not have ``num_classes`` columns, or a label lies outside [0, num_classes).
        """
        return _dense(self.labels, self.partner_labels, self.lam, num_classes, label_smoothing)


def _dense(labels: Tensor, partner_labels: Tensor, lam: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    checks.positive_int("num_classes", num_classes)
    label_smoothing = checks.fraction("label_smoothing", label_smoothing)
    lam = lam.float()
    if labels.is_floating_point():
        checks.shape("labels", labels, (labels.shape[0], num_classes))
        soft = torch.lerp(partner_labels.float(), labels.float(), lam.reshape(-1, 1))
        return soft * (1 - label_smoothing) + label_smoothing / num_classes
    rows = labels.new_empty((labels.shape[0], num_classes), dtype=torch.float32, device=labels.device)
    lam = lam.expand(labels.shape[0])
    return reference.dense_target(rows, labels, partner_labels, lam, None, label_smoothing)


def check_labels(labels: Tensor, batch: int, like: Tensor) -> None:
    """Raise unless ``labels`` are (batch,) int64 or (batch, C) floating point on the device of ``like``."""
    checks.tensor("labels", labels)
    if labels.dim() == 0 or labels.shape[0] != batch:
        raise ValueError(f"labels must have one row for each of the {batch} samples, got shape {tuple(labels.shape)}")
    if labels.is_floating_point():
        if labels.dim() != 2:
            raise ValueError(f"soft labels must have shape (B, C), got {tuple(labels.shape)}")
    else:
        checks.dtype("labels", labels, (torch.int64,))
    checks.same_device("labels", labels, "x", like)


def mix_labels(
    labels: Tensor, partner: Tensor, lam: Tensor | float, num_classes: int, label_smoothing: float = 0.0
) -> Tensor:
    """Mixed soft labels: λ_i y_i + (1 - λ_i) y_partner(i) (mixup, Zhang et al., 2018, eq. 1).

    Args:
        labels: (B,) int64 classes in [0, num_classes), or (B, num_classes) soft labels.
        partner: (B,) int64 in [0, B).
        lam: weight of the own label in [0, 1]: a float, a 0-d tensor or (B,).
        num_classes: C.
        label_smoothing: in [0, 1].

    Returns:
        (B, C) float32.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or value.
    """
    checks.tensor("labels", labels)
    checks.tensor("partner", partner)
    check_labels(labels, labels.shape[0] if labels.dim() else 0, partner)
    checks.shape("partner", partner, labels.shape[:1])
    reference.check_range("partner", partner, 0, labels.shape[0] - 1, f"in [0, {labels.shape[0] - 1}]")
    if isinstance(lam, Tensor):
        reference.check_range("lam", lam, 0, 1, "in [0, 1]")
    else:
        lam = torch.full((), checks.fraction("lam", lam), device=labels.device)
    return _dense(labels, labels[partner], lam, num_classes, label_smoothing)


class Mixup:
    """Plain mixup of a batch and its labels (Zhang et al., 2018), our baseline: :class:`MixupE` without clean rows.

    Args:
        alpha, beta: λ ~ Beta(alpha, beta), > 0; beta is alpha if None.
        per_sample: draw one λ for each sample instead of one for the batch.
        pairing: whom a sample is mixed with: ``"random"`` permutation, ``"flip"`` (B - 1 - i, as timm) or ``"roll"``
            (i - 1, as torchvision).
        prob: probability that a batch (a sample, with ``per_sample``) is mixed at all, in [0, 1].
        lam_distribution: where λ comes from instead of Beta(alpha, beta): see :mod:`mixupe_kernels.sampling`.
        generator: source of randomness, on the batch's device; torch's default for the device if None.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.

    Calling it with ``x`` (B, ...) and ``labels``, (B,) int64 or (B, C) soft, returns ``(x, MixedTarget)``. Setting
    ``enabled`` to False makes it return plain samples; it is read at every call, so a schedule must change it in the
    process that trains, not in a copy that a data loader's worker holds.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float | None = None,
        *,
        per_sample: bool = False,
        pairing: str = "random",
        prob: float = 1.0,
        lam_distribution: sampling.Beta | None = None,
        generator: torch.Generator | None = None,
    ):
        self.lam_distribution = lam_distribution or sampling.Beta(alpha, beta)
        self.per_sample = per_sample
        self.pairing = checks.choice("pairing", pairing, tuple(sampling.PAIRINGS))
        self.prob = checks.fraction("prob", prob)
        self.generator = generator
        self.enabled = True

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, MixedTarget]:
        checks.tensor("x", x)
        if x.dim() == 0:
            raise ValueError("x must have a batch dimension, got a 0-d tensor")
        checks.dtype("x", x, checks.LOGITS_DTYPES)
        check_labels(labels, x.shape[0], x)
        batch, device = x.shape[0], x.device
        if not self.enabled or batch == 0:
            return x, MixedTarget(labels, labels, torch.ones(batch, device=device), batch, 0, 0.0)
        lam = self._draw_lam(batch, device)
        partner = sampling.PAIRINGS[self.pairing](batch, self.generator, device)
        mixed, clean, num_reg, reg_weight = self._plan(batch, device)
        if mixed is not None:
            partner = partner[mixed]
            lam = lam[mixed] if lam.dim() else lam
        if clean is None:
            rows, lam = mixed, lam.expand(partner.shape[0])
        else:
            rows = torch.cat([torch.arange(batch, device=device) if mixed is None else mixed, clean])
            lam = torch.cat([lam.expand(partner.shape[0]), torch.ones(clean.shape[0], device=device)])
            partner = torch.cat([partner, clean])
        num_mixed = lam.shape[0] - (0 if clean is None else clean.shape[0])
        x = ops._call(ops.mix_op, x, partner, lam.to(reference.accumulate_dtype(x.dtype)), rows)
        own = labels if rows is None else labels[rows]
        return x, MixedTarget(own, labels[partner], lam, num_mixed, num_reg, reg_weight)

    def _draw_lam(self, batch: int, device: torch.device) -> Tensor:
        size = (batch,) if self.per_sample else ()
        lam = self.lam_distribution.sample(size, self.generator, device)
        if self.prob < 1:
            chosen = torch.rand(size, device=device, generator=self.generator) < self.prob
            lam = torch.where(chosen, lam, 1.0)
        return lam

    def _plan(self, batch: int, device: torch.device) -> tuple[Tensor | None, Tensor | None, int, Tensor | float]:
        """(rows to mix, rows to append clean, rows of the regularizer, its weight); None stands for all, and for none."""
        return None, None, 0, 0.0


class MixupE(Mixup):
    """The batch of MixupE (Zou et al., UAI 2023): mixup's rows, then the clean rows its regularizer is taken on.

    The model sees one batch, so BatchNorm sees both kinds of rows in it. What each policy costs a step that is bound by
    throughput, against mixup, and what it estimates:

    ======================================  =============  =========================================================
    policy                                  cost           regularizer
    ======================================  =============  =========================================================
    full (default, the paper's)             2.0            on every clean row of the batch
    ``clean_fraction=ρ``                    1 + ρ          the same, on a uniform sample of ρB rows: unbiased
    ``clean_fraction=ρ, split=True``        1.0            the same; those ρB rows are not mixed: unbiased
    ``regularize="mixed"``                  1.0            at the mixed rows, with their mixed targets: another
                                                           regularizer than eq. 7 (Algorithm 1 read to the letter)
    ``interval=k``                          1 + 1/k        on every k-th batch, with k times the weight: unbiased
    ======================================  =============  =========================================================

    Args:
        alpha, beta, per_sample, pairing, prob, lam_distribution, generator: as for :class:`Mixup`.
        clean_fraction: ρ in (0, 1], clean rows over rows of the batch; rounded so that all rows are a multiple of 8.
        split: take the clean rows out of the mixed ones.
        regularize: ``"clean"`` or ``"mixed"`` rows.
        interval: regularize every ``interval``-th batch, >= 1.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value, or two that exclude each other.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float | None = None,
        *,
        clean_fraction: float = 1.0,
        split: bool = False,
        regularize: str = "clean",
        interval: int = 1,
        **mixup_arguments,
    ):
        super().__init__(alpha, beta, **mixup_arguments)
        self.clean_fraction = checks.number(
            "clean_fraction", clean_fraction, "a number in (0, 1]", lambda fraction: 0 < fraction <= 1
        )
        self.split = split
        self.regularize = checks.choice("regularize", regularize, ("clean", "mixed"))
        self.interval = checks.positive_int("interval", interval)
        if regularize == "mixed" and (split or clean_fraction != 1):
            raise ValueError("regularize must be 'clean' with split or clean_fraction, got 'mixed'")
        if split and clean_fraction == 1:
            raise ValueError("clean_fraction must be below 1 with split, got 1: no row would be mixed")
        self.steps = 0
        self._reg_weight: dict[torch.device, Tensor] = {}

    def num_clean(self, batch: int) -> int:
        """Clean rows for a batch of ``batch`` samples: about ρB, so that all rows are a multiple of 8 where possible."""
        if self.clean_fraction == 1:
            return batch
        wanted = max(round(self.clean_fraction * batch), 1)
        if self.split:
            return min(wanted, batch - 1)
        rounded = round((batch + wanted) / 8) * 8 - batch
        if rounded < 1:
            rounded += 8
        return rounded if rounded <= batch else min(wanted, batch)

    def _plan(self, batch, device):
        self.steps += 1
        if self.steps % self.interval:
            return None, None, 0, 0.0
        weight = self._reg_weight.get(device)
        if weight is None:
            value = self.lam_distribution.expected_a_lambda * self.interval
            weight = self._reg_weight[device] = torch.full((), value, device=device)
        if self.regularize == "mixed":
            return None, None, batch, weight
        count = self.num_clean(batch)
        if count == batch:
            return None, torch.arange(batch, device=device), count, weight
        order = torch.randperm(batch, generator=self.generator, device=device)
        if self.split:
            return order[count:], order[:count], count, weight
        return None, order[:count], count, weight
