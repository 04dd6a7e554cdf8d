"""Everything about a batch but its samples: which rows it has, with which partners, weights and labels, drawn at random."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .. import checks, ops
from ..conventions import IGNORE_INDEX, constant, moved, rewritten, sequence
from ..target import MixedTarget
from . import combination, cutmix, sampling
from . import pairing as pairings
from .labels import one_hot, share_of_kept
from .progress import ONE, Progress
from .randomness import Seeds, Source, Stream
from .schedule import LinearRamp

if TYPE_CHECKING:
    from .mixup import Mixup


class Draw(NamedTuple):
    """What was drawn for a batch of B samples: how its N rows are made of them.

    Attributes:
        batch: B.
        partner: (N,) int64, or None for the flip of all rows. With ``offsets``, (T,) int64.
        lam: λ as ``mix`` takes it: 0-d or (N,). With ``offsets``, (T,) weights.
        target: of the N rows.
        rows: (N,) int64, each row's own sample; None for 0, 1, ..., B - 1.
        offsets: (N + 1,) int64 where rows are made of more than two samples: row i is the sum over t in
            [offsets_i, offsets_{i+1}) of lam_t · x[partner_t].
        box: (4,) int64, top, bottom, left and right of CutMix's box, in which a row is its partner's sample, or (N, 4), one for
            each row; None without.
        plain: the rows are the samples as they are.
    """

    batch: int
    partner: Tensor | None
    lam: Tensor
    target: MixedTarget
    rows: Tensor | None = None
    offsets: Tensor | None = None
    box: Tensor | None = None
    plain: bool = False


class Layout(NamedTuple):
    """Which samples become rows, (N,) int64, first ``num_mixed`` mixed ones and then clean ones; None for all of them mixed,
    in their order. The last ``num_reg`` rows are regularized."""

    rows: Tensor | None
    num_mixed: int
    num_reg: int


def one(device: torch.device) -> Tensor:
    return constant(("one", device), lambda: torch.ones((), dtype=torch.float32, device=device))


def plain_draw(labels: Tensor, **_) -> Draw:
    """The samples as they are; takes what :meth:`Plan.draw` takes."""
    batch, device = labels.shape[0], labels.device
    lam = torch.ones(batch, dtype=torch.float32, device=device)
    return Draw(batch, None, one(device), MixedTarget(labels, labels, lam, batch, 0, 0.0), plain=True)


class CleanRows:
    """Which rows :class:`MixupE` regularizes, and how often; its arguments of these names."""

    def __init__(self, given: Any):
        self.fraction = checks.number(
            "clean_fraction", given.clean_fraction, "a number in (0, 1]", lambda fraction: 0 < fraction <= 1
        )
        self.split = checks.boolean("split", given.split)
        self.mixed = checks.choice("regularize", given.regularize, ("clean", "mixed")) == "mixed"
        self.interval = checks.positive_int("interval", given.interval)
        self.eta_ramp = given.eta_ramp
        if self.eta_ramp is not None and not callable(self.eta_ramp):
            raise TypeError(f"eta_ramp must be a function of the epoch or None, got {self.eta_ramp!r}")
        if self.mixed and (self.split or self.fraction != 1):
            raise ValueError("regularize must be 'clean' with split or clean_fraction, got 'mixed'")
        if self.split and self.fraction == 1:
            raise ValueError("clean_fraction must be below 1 with split, got 1: no row would be mixed")
        if given.inplace and not self.mixed:
            raise ValueError(
                "regularize must be 'mixed' with inplace, got 'clean': clean rows need memory of their own"
            )

    def eta_factor(self, epoch: float) -> float:
        return 1.0 if self.eta_ramp is None else checks.non_negative("eta_ramp(epoch)", self.eta_ramp(epoch))

    def num_clean(self, batch: int) -> int:
        """Clean rows for a batch of ``batch`` samples: about ρB, so that all rows are a multiple of 8 if they can be."""
        if self.fraction == 1:
            return batch
        wanted = max(round(self.fraction * batch), 1)
        if self.split:
            return min(wanted, batch - 1)
        rounded = max(round((batch + wanted) / 8) * 8 - batch, 8 - batch % 8)  # 1 at least
        if rounded > batch:
            rounded -= 8
            return rounded if rounded >= 1 else wanted
        return rounded

    def num_rows(self, batch: int) -> int:
        return batch if self.split or self.mixed or batch == 0 else batch + self.num_clean(batch)

    def layout(self, batch: int, device: torch.device, source: Source) -> Layout:
        if self.mixed:
            return Layout(None, batch, batch)
        count = batch if self.fraction == 1 else self.num_clean(batch)
        if count == batch:
            twice = constant(("twice", batch, device), lambda: torch.arange(batch, device=device).repeat(2))
            return Layout(twice, batch, batch)
        order = pairings.random(batch, source, device)
        if self.split:
            return Layout(order, batch - count, count)
        return Layout(torch.cat([torch.arange(batch, device=device), order[:count]]), batch, count)


class Plan:
    """What is drawn for each batch, by which law, and where training is: λ, partners, rows, boxes, schedule and state.

    Args:
        given: the mixer whose arguments these are; ``clean``, its clean rows.
    """

    def __init__(self, given: Mixup, clean: CleanRows | None = None):
        self.clean = clean
        self.alpha, self.beta = given.alpha, given.beta
        self.given_pairing = pairings.as_pairing(given.pairing)
        self.by_pair = isinstance(given.per_sample, str) and given.per_sample == "pair"
        self.per_sample = self.by_pair or checks.boolean("per_sample", given.per_sample)
        self.by_class = self.given_pairing in (pairings.same_class, pairings.different_class)
        self.prob = checks.fraction("prob", given.prob)
        self.num_samples = checks.positive_int("num_samples", given.num_samples)
        self.num_classes = None if given.num_classes is None else checks.positive_int("num_classes", given.num_classes)
        boxes = given.cutmix_alpha
        self.cutmix = boxes if boxes is None or isinstance(boxes, cutmix.Boxes) else cutmix.Boxes(boxes)
        self.switch_prob = checks.fraction("switch_prob", given.switch_prob)
        self.warmup_epochs = checks.non_negative("warmup_epochs", given.warmup_epochs)
        self.off_epoch = None if given.off_epoch is None else checks.non_negative("off_epoch", given.off_epoch)
        self.generator = given.generator
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")
        self.seeds = Seeds.of(given.seed, given.same_draws, self.generator)
        if self.seeds is not None:
            self.generator = self.seeds.generator(torch.device("cpu"))
        self.stream = None if self.generator is None else Stream.of(self.generator)
        law = given.lam_distribution
        self.given_law = None if law is None else sampling.as_distribution(law)
        # Code of the caller's, which may return nonsense: checked, and what was drawn before it is given back.
        self.across = self.given_pairing is pairings.across_ranks
        self._own_pairing = not self.across and self.given_pairing not in pairings.PAIRINGS.values()
        self._own_law = law is not None and type(self.given_law).__module__ != sampling.__name__
        self.careful = self._own_pairing or self._own_law or isinstance(self.given_law, sampling.Custom)
        combination.check(self)
        self._ramped = isinstance(self.alpha, LinearRamp) or (clean is not None and clean.eta_ramp is not None)
        # On devices, what a ramp changes is written where it was: a captured CUDA graph reads it there.
        self._weights: dict[torch.device, Tensor] = {}
        self._alphas: dict[torch.device, Tensor] = {}
        self.progress = Progress(1 if clean is None else clean.interval)
        self.set_epoch(0)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "generator"}
        return {**state, "_weights": {}, "_alphas": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, generator=None if state["stream"] is None else state["stream"].generator)
        self._write_on_devices()

    def _law(self, alpha: float) -> sampling.Distribution | sampling.Dirichlet:
        if self.given_law is not None:
            return self.given_law
        if alpha == 0:  # no mixing, as in timm
            return sampling.Fixed(1.0)
        if self.num_samples > 2:
            return sampling.Dirichlet(alpha, self.num_samples)
        law = sampling.Beta(alpha, self.beta)
        law.uniform &= not isinstance(self.alpha, LinearRamp)  # the same draws in all epochs, and the same graph
        return law

    def set_epoch(self, epoch: float) -> None:
        """Say where training is, before an epoch's first batch or within it: a number >= 0, possibly fractional."""
        epoch = checks.non_negative("epoch", epoch)
        law = self._law(self.alpha(epoch) if isinstance(self.alpha, LinearRamp) else self.alpha)
        factor = 0.0 if self.clean is None else self.clean.eta_factor(epoch) * self.clean.interval
        self.law, self.reg_weight = law, factor * law.expected_a_lambda
        self._reg_weight = torch.tensor(self.reg_weight, dtype=torch.float32, device="cpu")
        self._write_on_devices()
        self.progress.epoch = epoch
        if self.seeds is not None and self.seeds.enter(int(epoch)):
            self.reseed(self.seeds.of_draws())
        self._update_active()

    def begin_on(self, device: torch.device, seeds: Seeds) -> torch.Generator:
        """Let the stream of a seed begin on another device than it was on."""
        self.generator = seeds.generator(device)
        self.stream = Stream.of(self.generator)
        return self.generator

    def reseed(self, seed: int) -> None:
        """Draw from here on as ``seed`` says, and this process, if it is a data loader's worker."""
        if self.generator is not None and self.stream is not None:
            self.generator.manual_seed(seed)
            self.stream.in_worker = False
            self.stream.enter_worker()

    def _write_on_devices(self) -> None:
        for weight in self._weights.values():
            weight.fill_(self.reg_weight)
        if isinstance(self.alpha, LinearRamp) and isinstance(self.law, sampling.Beta | sampling.Dirichlet):
            self.law.gammas.share(self._alphas, min(self.alpha.start, self.alpha.stop))

    def set_enabled(self, enabled: bool) -> None:
        self.progress.enabled = checks.boolean("enabled", enabled)
        self._update_active()

    def _update_active(self) -> None:
        self.epoch, self.enabled = self.progress.epoch, self.progress.enabled
        begun = self.epoch >= self.warmup_epochs and (self.off_epoch is None or self.epoch < self.off_epoch)
        self.active = self.enabled and begun

    def _follow_main_process(self) -> None:
        """In a data loader's worker: draw from its stream, with the epoch and ``enabled`` of the process that trains."""
        progress = self.progress
        if not progress.in_worker:
            progress.enter_worker()
            if self.stream is not None:
                self.stream.enter_worker()
        if progress.epoch != self.epoch:
            self.set_epoch(progress.epoch)
        elif progress.enabled != self.enabled:
            self._update_active()

    def draw(
        self,
        labels: Tensor,
        *,
        ids: Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        others: Tensor | None = None,
    ) -> Draw:
        """λ, partners, rows and target of a batch with these labels; see :meth:`mixupe_kernels.Mixup.draw`."""
        compiled = torch.compiler.is_compiling()
        if not compiled and get_worker_info() is not None:
            self._follow_main_process()
        batch, device = labels.shape[0], labels.device
        if batch == 0 or not self.active:
            return plain_draw(labels)
        source: Source = self.stream
        if not compiled:
            source = self.generator
            if source is not None and source.device.type != device.type:
                if self.seeds is None:
                    raise ValueError(f"generator must be on the device of labels, {device}, got {source.device}")
                source = self.begin_on(device, self.seeds)
        if labels.dim() != 1 or self.cutmix is not None or self.by_class:
            combination.check_labels(self, labels, image_size)
        clean = self.clean
        if clean is not None and clean.interval > 1 and not self.progress.due():
            clean = None
        if self.num_samples > 2:
            draw = self._draw_many(labels, ids, source, clean)
        else:
            draw = self._draw_pairs(labels, ids, image_size, source, clean, others)
        self.progress.own.add_(ONE)  # a number would be made a tensor first: 2.5 against 0.9 µs
        self.progress.phase = self.progress.phase.next
        return draw

    def _draw_pairs(
        self,
        labels: Tensor,
        ids: Tensor | None,
        image_size: tuple[int, int] | None,
        source: Source,
        clean: CleanRows | None,
        others: Tensor | None = None,
    ) -> Draw:
        batch, device = labels.shape[0], labels.device
        if self.across and others is None:
            raise ValueError("pairing must not be 'across_ranks' where only labels are given: call the mixer with x")
        # λ of the labels and λ of the pixels differ with CutMix only.
        size = () if not self.per_sample else ((batch + 1) // 2,) if self.by_pair else (batch,)
        lam = self.law.sample(size, source, device)
        if self._own_law:
            name = "lam_distribution.sample(size, generator, device)"
            lam = moved(name, sampling.check(name, lam, size, device), device, torch.float32)
        if self.prob < 1:
            lam = self._leave_some(lam, one(device), source)
        pixel_lam = lam
        box = None
        if self.cutmix is not None and image_size is not None:
            lam, pixel_lam, box = self.cutmix.draw(lam, image_size, source, self.switch_prob, self.prob)
        if self.by_pair:
            drawn = lam, None if pixel_lam is lam else pixel_lam, box
            lam, pixel_lam, box = pairings.mirrored(batch, *drawn)
            pixel_lam = lam if pixel_lam is None else pixel_lam
        maps = labels.dim() > 1 and not labels.is_floating_point()
        if maps:  # a label map is cut as its image is, so its λ is that of the pixels outside
            lam = pixel_lam
        rows, num_mixed, num_reg, reg_weight = self._layout(batch, device, source, clean)
        partner = None
        if self.given_pairing is not pairings.flip:
            partner = self.given_pairing(batch, source, device, labels, ids)
        if self._own_pairing:
            pairings.check(partner, batch, device)
        if others is not None and partner is not None:
            # What other ranks sent are samples, too, of which no row is made.
            labels, rows = torch.cat([labels, others]), sequence(batch, device) if rows is None else rows
            batch, partner = 2 * batch, partner.repeat(2)
            lam = lam.repeat(2) if lam.dim() else lam
        if rows is None:
            own, other = labels, labels.flip(0) if partner is None else labels.index_select(0, partner)
            all_lam = lam.expand(batch)
        else:
            several = labels.dim() > 1  # numbers to a sample, which the operator takes one of
            samples = sequence(batch, device) if several else labels
            pairs = partner
            all_lam, partner, own, other = ops.call(ops.mixed_target_op, samples, pairs, lam, rows, num_mixed)
            if several:
                own, other = labels.index_select(0, own), labels.index_select(0, other)
            if pixel_lam is lam:
                pixel_lam = all_lam
            else:
                pixel_lam, *_ = ops.call(ops.mixed_target_op, samples, pairs, pixel_lam, rows, num_mixed)
            box = None if box is None else cutmix.of_rows(box, rows, num_mixed)
        if maps and box is not None:
            own = torch.where(cutmix.inside(box, own), other, own)
        target = MixedTarget(own, other, all_lam, num_mixed, num_reg, reg_weight)
        return Draw(batch, partner, pixel_lam, target, rows=rows, box=box)

    def _layout(
        self, batch: int, device: torch.device, source: Source, clean: CleanRows | None
    ) -> tuple[Tensor | None, int, int, Tensor | float]:
        """The samples that become rows (None for all, in their order), the counts of mixed and regularized rows, and w."""
        if clean is None:
            return None, batch, 0, 0.0
        return *clean.layout(batch, device, source), self._weight(device)

    def _weight(self, device: torch.device) -> Tensor | float:
        """w: a number, or a tensor where a graph would make a constant of it."""
        if torch.compiler.is_compiling():  # or a symbol, which makes the graph twice
            return torch.ones((), dtype=torch.float32, device=device) * self._reg_weight
        if not self._ramped or device.type == "cpu":
            return self.reg_weight
        make = functools.partial(torch.full, (), self.reg_weight, dtype=torch.float32, device=device)
        return rewritten(self._weights, device, device, make, "a mixer with a ramp")

    def _leave_some(self, lam: Tensor, own: Tensor, source: Source) -> Tensor:
        """λ or weights, and those of the own sample alone, ``own``, with probability 1 - ``prob``."""
        size = lam.shape[: lam.dim() - own.dim()]
        chosen = sampling.rand(size, source, lam.device) < self.prob
        return torch.where(chosen.reshape(size + (1,) * own.dim()), lam, own)

    def _draw_many(self, labels: Tensor, ids: Tensor | None, source: Source, clean: CleanRows | None) -> Draw:
        """Rows of ``num_samples`` samples: the own one, then those of as many draws of the pairing."""
        batch, device, terms = labels.shape[0], labels.device, self.num_samples
        soft, kept = one_hot(labels, self.num_classes)
        own = (sequence(terms, device) == 0).to(torch.float32)
        weights = own
        if isinstance(self.law, sampling.Dirichlet):  # else alpha is 0
            weights = self.law.sample((batch,) if self.per_sample else (), source, device)
        if self.prob < 1:
            weights = self._leave_some(weights, own, source)
        weights = weights.expand(batch, terms)
        others = [self.given_pairing(batch, source, device, labels, ids) for _ in range(terms - 1)]
        if self._own_pairing:
            others = [pairings.check(partner, batch, device) for partner in others]
        index = torch.stack([sequence(batch, device), *others], 1)
        rows, num_mixed, num_reg, reg_weight = self._layout(batch, device, source, clean)
        if rows is not None:
            mixed, unmixed = rows[:num_mixed], rows[num_mixed:]
            weights, index = weights[mixed], index[mixed]
        dense = (weights.unsqueeze(-1) * soft[index]).sum(1)
        share = weights.new_ones(num_mixed) if kept is None else share_of_kept(weights, kept[index])
        weights, index = weights.reshape(-1), index.reshape(-1)
        offsets = sequence(num_mixed + 1, device) * terms
        if rows is not None:
            dense = torch.cat([dense, soft[unmixed]])
            share = torch.cat([share, weights.new_ones(unmixed.shape[0]) if kept is None else kept[unmixed].float()])
            index = torch.cat([index, unmixed])
            weights = torch.cat([weights, weights.new_ones(unmixed.shape[0])])
            offsets = torch.cat([offsets, sequence(unmixed.shape[0], device) + (num_mixed * terms + 1)])
        other = dense
        if kept is not None:
            dense = dense / share.where(share > 0, 1.0).unsqueeze(1)
            other = torch.full_like(share, IGNORE_INDEX, dtype=torch.int64)
        target = MixedTarget(dense, other, share, num_mixed, num_reg, reg_weight)
        return Draw(batch, index, weights, target, rows, offsets)
