"""Everything about a batch but its samples: which rows it has, with which partners, weights and labels, drawn at random."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, ops
from ..conventions import constant, sequence
from ..target import MixedTarget, one_hot
from . import cutmix, sampling
from . import pairing as pairings
from .schedule import LinearRamp


class Draw(NamedTuple):
    """What was drawn for a batch of B samples: how its N rows are made of them.

    Attributes:
        partner: (N,) int64, or None for the flip of all rows. With ``offsets``, (T,) int64.
        lam: λ as ``mix`` takes it: 0-d or (N,). With ``offsets``, (T,) weights.
        target: of the N rows.
        rows: (N,) int64, each row's own sample; None for 0, 1, ..., B - 1.
        offsets: (N + 1,) int64 where rows are made of more than two samples: row i is the sum over t in
            [offsets_i, offsets_{i+1}) of lam_t · x[partner_t].
        box: (4,) int64, top, bottom, left and right of CutMix's box, in which a row is its partner's sample; None without.
        plain: the rows are the samples as they are.
    """

    partner: Tensor | None
    lam: Tensor
    target: MixedTarget
    rows: Tensor | None = None
    offsets: Tensor | None = None
    box: Tensor | None = None
    plain: bool = False


class Layout(NamedTuple):
    """Which samples become rows, (N,) int64, first ``num_mixed`` mixed ones and then clean ones; None for all of them mixed,
    in their order. The rows and weight of R."""

    rows: Tensor | None
    num_mixed: int
    num_reg: int
    reg_weight: Tensor


def one(device: torch.device) -> Tensor:
    return constant(("one", device), lambda: torch.ones((), device=device))


def plain_draw(labels: Tensor, **_) -> Draw:
    """The samples as they are; takes what :meth:`Drawing.draw` takes."""
    batch, device = labels.shape[0], labels.device
    target = MixedTarget(labels, labels, torch.ones(batch, device=device), batch, 0, 0.0)
    return Draw(None, one(device), target, plain=True)


class Drawing:
    """What :class:`Mixup` and :class:`MixupE` draw; their arguments of these names, and their schedule and state."""

    def __init__(
        self,
        alpha: float | LinearRamp = 1.0,
        beta: float | None = None,
        *,
        per_sample: bool = False,
        pairing: str | Callable[..., Tensor] = "random",
        prob: float = 1.0,
        lam_distribution: sampling.Distribution | Callable[..., Tensor] | None = None,
        num_samples: int = 2,
        num_classes: int | None = None,
        cutmix_alpha: float | None = None,
        switch_prob: float = 0.5,
        warmup_epochs: float = 0,
        off_epoch: float | None = None,
        generator: torch.Generator | None = None,
    ):
        self.alpha, self.beta = alpha, beta
        self.per_sample = per_sample
        self.pairing = pairing
        self._pair = pairings.as_pairing(pairing)
        self.prob = checks.fraction("prob", prob)
        self.num_samples = checks.positive_int("num_samples", num_samples)
        self.num_classes = None if num_classes is None else checks.positive_int("num_classes", num_classes)
        self.cutmix = None if cutmix_alpha is None else sampling.Beta(checks.positive("cutmix_alpha", cutmix_alpha))
        self.switch_prob = checks.fraction("switch_prob", switch_prob)
        self.warmup_epochs = checks.non_negative("warmup_epochs", warmup_epochs)
        self.off_epoch = None if off_epoch is None else checks.non_negative("off_epoch", off_epoch)
        self.generator = generator
        self.enabled = True
        self.steps = 0
        self._given_distribution = None if lam_distribution is None else sampling.as_distribution(lam_distribution)
        self._check_combination()
        self.set_epoch(0)

    def _check_combination(self) -> None:
        if self.num_samples == 1:
            raise ValueError("num_samples must be an int >= 2, got 1")
        if self.num_samples > 2:
            for name, value in (
                ("cutmix_alpha", self.cutmix),
                ("lam_distribution", self._given_distribution),
                ("beta", self.beta),
            ):
                if value is not None:
                    raise ValueError(f"{name} must be None with num_samples > 2, got {value!r}")
        if isinstance(self.alpha, LinearRamp) and self._given_distribution is not None:
            raise ValueError(f"alpha must be a number where lam_distribution is given, got {self.alpha!r}")
        if self.cutmix is not None and self.per_sample:
            raise ValueError("per_sample must be False with cutmix_alpha, got True: a batch has one box")

    def set_epoch(self, epoch: float) -> None:
        """Say where training is, before an epoch's first batch or within it: a number >= 0, possibly fractional."""
        self.epoch = checks.non_negative("epoch", epoch)
        self._reg_weights: dict[tuple[float, torch.device], Tensor] = {}
        alpha = self.alpha(self.epoch) if isinstance(self.alpha, LinearRamp) else self.alpha
        if self.num_samples > 2:
            self.lam_distribution = sampling.Dirichlet(alpha, self.num_samples)
        else:
            self.lam_distribution = self._given_distribution or sampling.Beta(alpha, self.beta)

    @property
    def active(self) -> bool:
        """Whether batches are mixed now: ``enabled``, after the warm-up and before ``off_epoch``."""
        if not self.enabled or self.epoch < self.warmup_epochs:
            return False
        return self.off_epoch is None or self.epoch < self.off_epoch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of batches drawn, ``enabled``, and the state of the generator.

        Without a generator of its own it draws from torch's, whose state the run has to keep (``torch.get_rng_state``).
        """
        generator = None if self.generator is None else self.generator.get_state()
        return {"epoch": self.epoch, "steps": self.steps, "enabled": self.enabled, "generator": generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken: the same batches are drawn.

        Raises:
            ValueError: if entries are missing, or only one of the two has a generator of its own.
        """
        missing = {"epoch", "steps", "enabled", "generator"} - set(state)
        if missing:
            raise ValueError(f"state must have all entries of state_dict(), {sorted(missing)} are missing")
        if (state["generator"] is None) != (self.generator is None):
            has = "none" if self.generator is None else "one"
            raise ValueError(f"generator must be given where the saved one had one, and only there; this has {has}")
        self.set_epoch(state["epoch"])
        self.steps, self.enabled = state["steps"], state["enabled"]
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())

    def draw(self, labels: Tensor, *, ids: Tensor | None = None, image_size: tuple[int, int] | None = None) -> Draw:
        """λ, partners, rows and target of a batch with these labels.

        Args:
            labels: (B,) int64 or (B, C) soft, on the device of the generator.
            ids: (B,) int64, the samples' numbers, for pairings that ask for them.
            image_size: height and width, which CutMix needs.
        """
        batch, device = labels.shape[0], labels.device
        if batch == 0 or not self.active:
            return plain_draw(labels)
        self.steps += 1
        if self.num_samples > 2:
            return self._draw_many(labels, ids)
        # λ of the labels and λ of the pixels differ with CutMix only.
        lam = pixel_lam = self._draw_lam(batch, device)
        box = None
        if self.cutmix is not None:
            lam, pixel_lam, box = self._draw_box(lam, image_size)
        rows, num_mixed, num_reg, reg_weight = self._layout(batch, device)
        flipped = self._pair is pairings.flip
        if rows is None and flipped:
            target = MixedTarget(labels, labels.flip(0), lam.expand(batch), batch, num_reg, reg_weight)
            return Draw(None, pixel_lam, target, box=box)
        if rows is None:
            partner = self._pair(batch, self.generator, device, labels, ids)
            target = MixedTarget(labels, labels.index_select(0, partner), lam.expand(batch), batch, num_reg, reg_weight)
            return Draw(partner, pixel_lam, target, box=box)
        pairs = None if flipped else self._pair(batch, self.generator, device, labels, ids)
        soft = labels.dim() > 1
        samples = sequence(batch, device) if soft else labels
        all_lam, partner, own, other = ops.call(ops.mixed_target_op, samples, pairs, lam, rows, num_mixed)
        if soft:
            own, other = labels.index_select(0, own), labels.index_select(0, other)
        if pixel_lam is lam:
            pixel_lam = all_lam
        else:
            pixel_lam, *_ = ops.call(ops.mixed_target_op, samples, pairs, pixel_lam, rows, num_mixed)
        target = MixedTarget(own, other, all_lam, num_mixed, num_reg, reg_weight)
        return Draw(partner, pixel_lam, target, rows=rows, box=box)

    def _layout(self, batch: int, device: torch.device) -> Layout:
        return Layout(None, batch, 0, self._reg_weight(0.0, device))

    def _reg_weight(self, value: float, device: torch.device) -> Tensor:
        """R's weight as the loss takes it, made once an epoch."""
        weight = self._reg_weights.get((value, device))
        if weight is None:
            with torch.inference_mode(False):  # autograd refuses to save tensors made in inference mode
                weight = self._reg_weights[value, device] = torch.full((), value, device=device)
        return weight

    def _draw_lam(self, batch: int, device: torch.device) -> Tensor:
        size = (batch,) if self.per_sample else ()
        lam = self.lam_distribution.sample(size, self.generator, device)
        if self.prob < 1:
            chosen = torch.rand(size, device=device, generator=self.generator) < self.prob
            if self.num_samples == 2:
                return torch.where(chosen, lam, one(device))
            own = sequence(self.num_samples, device) == 0
            lam = torch.where(chosen.unsqueeze(-1), lam, own.to(lam.dtype))
        return lam

    def _draw_box(self, lam: Tensor, image_size: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(λ of the labels, λ of the pixels outside the box, box): an empty box in a batch that is mixed as ever."""
        if image_size is None:
            raise ValueError("image_size must be given with cutmix_alpha, got None")
        device, generator = lam.device, self.generator
        uniform = torch.rand(2, device=device, generator=generator)
        cut, used = uniform[0] < self.switch_prob, uniform[1] < self.prob
        box, box_lam = cutmix.draw_box(self.cutmix.sample((), generator, device), *image_size, generator)
        box_lam = torch.where(used, box_lam, one(device))
        return torch.where(cut, box_lam, lam), torch.where(cut, one(device), lam), box * (cut & used)

    def _draw_many(self, labels: Tensor, ids: Tensor | None) -> Draw:
        """Rows of ``num_samples`` samples: the own one, then those of as many draws of the pairing."""
        batch, device, terms = labels.shape[0], labels.device, self.num_samples
        soft = one_hot(labels, self.num_classes)
        weights = self._draw_lam(batch, device).expand(batch, terms)
        others = [self._pair(batch, self.generator, device, labels, ids) for _ in range(terms - 1)]
        index = torch.stack([sequence(batch, device), *others], 1)
        rows, num_mixed, num_reg, reg_weight = self._layout(batch, device)
        if rows is not None:
            mixed, clean = rows[:num_mixed], rows[num_mixed:]
            weights, index = weights[mixed], index[mixed]
        dense = (weights.unsqueeze(-1) * soft[index]).sum(1)
        weights, index = weights.reshape(-1), index.reshape(-1)
        offsets = sequence(num_mixed + 1, device) * terms
        if rows is not None:
            dense = torch.cat([dense, soft[clean]])
            index = torch.cat([index, clean])
            weights = torch.cat([weights, torch.ones(clean.shape[0], device=device)])
            offsets = torch.cat([offsets, sequence(clean.shape[0], device) + (num_mixed * terms + 1)])
        lam = torch.ones(dense.shape[0], device=device)
        target = MixedTarget(dense, dense, lam, num_mixed, num_reg, reg_weight)
        return Draw(index, weights, target, offsets=offsets)
