"""The batch the model sees: mixed rows first, clean rows after them, in one tensor with one target.

``MixupE`` draws λ and partners, mixes, and appends the clean rows that the regularizer is taken on; ``Mixup`` is the
same without clean rows. Both stand where ``timm.data.Mixup`` or ``torchvision.transforms.v2.MixUp`` stand in a loop.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, ops
from ..conventions import accumulate_dtype, constant, row_format, sequence
from ..target import MixedTarget, check_ids, check_labels
from . import inputs
from .plan import Draw, Drawing, Layout, one, plain_draw


def write(draw: Draw, x: Tensor, arguments: inputs.Arguments, out: Tensor | None) -> Tensor:
    """The N rows that were drawn, made of the samples ``x`` in one pass, into fresh memory or into ``out``."""
    scale, shift, dtype, memory_format = arguments
    if draw.plain and out is None and scale is None and dtype in (None, x.dtype):
        return x if memory_format is None else x.contiguous(memory_format=memory_format)
    compute = accumulate_dtype(x.dtype)
    if draw.offsets is not None:
        if arguments != inputs.UNCHANGED:
            # A pass of its own: the sum over samples takes weights, not a transform.
            x = ops.call(ops.mix_op, x, None, one(x.device).to(compute), None, *arguments)
        weights = draw.lam.to(accumulate_dtype(x.dtype))
        mixed = ops.call(ops.gather_sum_op, x, draw.partner, weights, draw.offsets)
        return mixed.contiguous(memory_format=row_format(x))
    lam = draw.lam if draw.lam.dtype is compute else draw.lam.to(compute)
    if out is None:
        return ops.call(ops.mix_op, x, draw.partner, lam, draw.rows, *arguments, draw.box)
    rows = draw.target.lam.shape[0]
    out = out if out.shape[0] == rows else out[:rows]
    ops.call(ops.mix_out_op, x, draw.partner, lam, draw.rows, scale, shift, draw.box, out=out)
    return out


class Mixup(Drawing):
    """Plain mixup of a batch and its labels (Zhang et al., 2018), our baseline: :class:`MixupE` without clean rows.

    Args:
        alpha, beta: λ ~ Beta(alpha, beta), > 0; beta is alpha if None. alpha may be a :class:`LinearRamp` over epochs.
        per_sample: draw one λ for each sample instead of one for the batch.
        pairing: whom a sample is mixed with: ``"random"`` permutation, ``"flip"`` (B - 1 - i, as timm), ``"roll"``
            (i - 1, as torchvision), ``"derangement"`` (random, never itself), ``"same_class"``, ``"different_class"``,
            or a function such as :class:`mixupe_kernels.pairing.Neighbors`.
        prob: probability that a batch (a sample, with ``per_sample``) is mixed at all, in [0, 1].
        lam_distribution: where λ comes from instead of Beta(alpha, beta): one of :mod:`mixupe_kernels.sampling`, or a
            function (see :class:`mixupe_kernels.sampling.Custom`).
        num_samples: mix K >= 2 samples, with weights ~ Dirichlet(alpha, ..., alpha) (mixup, §2). Above 2 the target is
            dense, class labels need ``num_classes``, and ``out`` is not taken.
        num_classes: C, for ``num_samples`` > 2.
        cutmix_alpha: alternate with CutMix (Yun et al., 2019) of λ ~ Beta(cutmix_alpha, cutmix_alpha), > 0; never if
            None. One box a batch; λ is corrected to its true area.
        switch_prob: probability of CutMix where ``cutmix_alpha`` is given, in [0, 1].
        mean, std: normalise the channels (dimension 1), x → (x - mean) / std as torchvision's ``Normalize``, in the same
            pass. uint8 is scaled to [0, 1] first, also without mean and std.
        dtype: of the batch returned; x's if None, float32 for uint8.
        memory_format: of the batch returned; x's if None.
        inplace: mix in the memory of x, which is then what is returned. Only for ``pairing="flip"`` without clean
            rows, and for x that needs no gradient and keeps its dtype.
        keys: which entries of a dict, tuple or list are mixed. By default every floating-point tensor, and every uint8
            tensor of 4 or 5 dimensions, that has one row for each label.
        labels_key: the entry of a dict that holds the labels.
        warmup_epochs: plain samples in the epochs before this one (mixup, §3.3).
        off_epoch: plain samples from this epoch on; never if None.
        generator: source of randomness, on the batch's device; torch's default for the device if None.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value, or two that exclude each other.

    Calling it with ``x`` (B, ...), floating point or uint8 in any layout, and ``labels``, (B,) int64 or (B, C) soft,
    returns ``(x, MixedTarget)``; plain samples are normalised and cast, too. Further arguments of the call:

    - ``x`` may be a tuple, list or dict, whose tensors are mixed with one λ and one partner; all other entries stay the
      same objects. mean, std and memory_format then apply to the tensors of 4 or 5 dimensions. Labels may be an entry
      of a dict, which holds the target afterwards.
    - ``out``: a buffer, or a tuple, list or dict of them, of at least ``num_rows(B)`` rows. Its first rows are written
      and returned instead of fresh memory, whose first touch costs more than mixing does.
    - ``ids``: (B,) int64, the samples' numbers in the data set, for pairings that ask for them.

    Setting ``enabled`` to False makes it return plain samples; it is read at every call, so a schedule must change it
    in the process that trains, not in a copy that a data loader's worker holds. ``set_epoch`` drives warm-up, off_epoch
    and ramps; ``state_dict`` holds what a resumed run needs to draw the same batches.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        inplace: bool = False,
        keys: Sequence[Hashable] | None = None,
        labels_key: Hashable = "labels",
        **drawing_arguments,
    ):
        super().__init__(alpha, beta, **drawing_arguments)
        self.transform = inputs.Transform(mean, std, dtype, memory_format)
        self.inplace = inplace
        if inplace and (self.pairing != "flip" or self.num_samples > 2):
            raise ValueError("inplace must be False unless pairing is 'flip', without num_samples, got True")
        if isinstance(keys, str):
            raise TypeError(f"keys must be a sequence of keys, got the string {keys!r}")
        self.keys, self.labels_key = keys, labels_key

    def num_rows(self, batch: int) -> int:
        """The most rows that a batch of ``batch`` samples becomes, which is what ``out`` must have."""
        return batch

    def apply(self, draw: Draw, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The rows that :meth:`draw` chose, of any samples (B, ...) such as hidden states, as they are: (N, ...).

        Differentiable in x; with ``out``, x must not require a gradient. mean, std, dtype and memory_format are left out. A
        draw of CutMix is for images of the size it was drawn for.
        """
        if out is not None:
            checks.no_gradient("out", x=x, out=out)
        return write(draw, x, inputs.UNCHANGED, out)

    def __call__(
        self,
        x: Tensor | Sequence | Mapping,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        out: Tensor | Sequence | Mapping | None = None,
    ) -> tuple[Any, MixedTarget]:
        return self._batch(x, labels, ids, out, self.draw)

    def plain(self, x: Tensor | Sequence | Mapping, labels: Tensor | None = None) -> tuple[Any, MixedTarget]:
        """The samples as they are, normalised and cast as for the model: what a call returns with ``enabled`` False."""
        return self._batch(x, labels, None, None, plain_draw)

    def _batch(self, x, labels, ids, out, draw: Callable[..., Draw]) -> tuple[Any, MixedTarget]:
        """Check everything, then draw, then write."""
        if not isinstance(x, Tensor):
            return self._batch_of_several(x, labels, ids, out, draw)
        if x.dim() == 0:
            raise ValueError("x must have a batch dimension, got a 0-d tensor")
        check_labels(labels, x.shape[0], x)
        if ids is not None:
            check_ids(ids, labels)
        arguments = self.transform.arguments("x", x, True)
        out = self._check_out("out", out, x, arguments)
        drawn = draw(labels, ids=ids, image_size=self._image_size([x]) if self.cutmix else None)
        return write(drawn, x, arguments, out), drawn.target

    def _batch_of_several(self, x, labels, ids, out, draw: Callable[..., Draw]) -> tuple[Any, MixedTarget]:
        if not isinstance(x, (Mapping, tuple, list)):
            raise TypeError(f"x must be a tensor, or a tuple, list or dict of tensors, got {type(x).__name__}")
        within = labels is None and isinstance(x, Mapping)
        if within:
            if self.labels_key not in x:
                raise ValueError(f"labels must be given, or be the entry {self.labels_key!r} of x, got {list(x)}")
            labels = x[self.labels_key]
        checks.tensor("labels", labels)
        batch = labels.shape[0] if labels.dim() else 0
        entries = inputs.entries_to_mix(x, batch, self.keys, self.labels_key)
        check_labels(labels, batch, next(iter(entries.values())))
        if ids is not None:
            check_ids(ids, labels)
        buffers = inputs.buffers(out, entries)
        prepared = {}
        for key, value in entries.items():
            checks.same_device(f"x[{key!r}]", value, "labels", labels)
            arguments = self.transform.arguments(f"x[{key!r}]", value, value.dim() in inputs.FORMATS.values())
            prepared[key] = (value, arguments, self._check_out(f"out[{key!r}]", buffers[key], value, arguments))
        drawn = draw(labels, ids=ids, image_size=self._image_size(entries.values()) if self.cutmix else None)
        changes: dict = {key: write(drawn, *arguments) for key, arguments in prepared.items()}
        if within:
            changes[self.labels_key] = drawn.target
        return inputs.replaced(x, changes), drawn.target

    def _check_out(self, name: str, out: Tensor | None, x: Tensor, arguments: inputs.Arguments) -> Tensor | None:
        """The buffer to write, checked; None for fresh memory."""
        if out is None and not self.inplace:
            return None
        checks.no_gradient("inplace" if self.inplace else "out", x=x)
        dtype = arguments.dtype or x.dtype
        if self.inplace:
            if out is not None:
                raise ValueError("out must be None with inplace, got a tensor")
            if dtype != x.dtype:
                raise ValueError(f"x must have dtype {dtype} with inplace, which keeps it, got {x.dtype}")
            return x
        if self.num_samples > 2:
            raise ValueError("out must be None with num_samples > 2, got a tensor")
        checks.tensor(name, out)
        checks.same_device(name, out, "x", x)
        rows = self.num_rows(x.shape[0])
        if out.dim() != x.dim() or out.shape[0] < rows or out.shape[1:] != x.shape[1:]:
            expected = ", ".join(map(str, x.shape[1:]))
            raise ValueError(f"{name} must have shape (>= {rows}, {expected}), got {tuple(out.shape)}")
        checks.dtype(name, out, checks.LOGITS_DTYPES if self.transform.dtype is None else (dtype,))
        return out

    def _image_size(self, samples) -> tuple[int, int]:
        sizes = {tuple(x.shape[-2:]) if x.dim() >= 3 else () for x in samples}
        if len(sizes) > 1 or () in sizes:
            raise ValueError(
                f"x must have shape (B, ..., H, W), one H and W for all, with cutmix_alpha, got {sorted(sizes)}"
            )
        return sizes.pop()


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
        clean_fraction: ρ in (0, 1], clean rows over rows of the batch; rounded so that all rows are a multiple of 8.
        split: take the clean rows out of the mixed ones.
        regularize: ``"clean"`` or ``"mixed"`` rows.
        interval: regularize every ``interval``-th batch, >= 1.
        eta_ramp: a factor on η, >= 0, as a function of the epoch, such as ``LinearRamp(0, 1, last_epoch=5)``; it enters
            the target's ``reg_weight``, so that the loss needs no schedule. 1 if None.

    All other arguments are those of :class:`Mixup`, of the same names. With CutMix the regularizer is the same, that of
    mixup's λ: it is taken on the clean rows.

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
        eta_ramp: Callable[[float], float] | None = None,
        **mixup_arguments,
    ):
        if eta_ramp is not None and not callable(eta_ramp):
            raise TypeError(f"eta_ramp must be a function of the epoch or None, got {eta_ramp!r}")
        self.eta_ramp = eta_ramp
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
        if self.inplace and regularize != "mixed":
            raise ValueError(
                "regularize must be 'mixed' with inplace, got 'clean': clean rows need memory of their own"
            )

    def set_epoch(self, epoch: float) -> None:
        super().set_epoch(epoch)
        factor = 1.0 if self.eta_ramp is None else checks.non_negative("eta_ramp(epoch)", self.eta_ramp(self.epoch))
        self._reg_factor = factor

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
        if rounded > batch:
            rounded -= 8
        return rounded if rounded >= 1 else wanted

    def num_rows(self, batch: int) -> int:
        return batch if self.split or self.regularize == "mixed" or batch == 0 else batch + self.num_clean(batch)

    def _layout(self, batch: int, device: torch.device) -> Layout:
        if self.steps % self.interval:
            return super()._layout(batch, device)
        weight = self._reg_weight(self.lam_distribution.expected_a_lambda * self.interval * self._reg_factor, device)
        if self.regularize == "mixed":
            return Layout(None, batch, batch, weight)
        count = self.num_clean(batch)
        if count == batch:
            twice = constant(("twice", batch, device), lambda: torch.arange(batch, device=device).repeat(2))
            return Layout(twice, batch, batch, weight)
        order = torch.randperm(batch, generator=self.generator, device=device)
        if self.split:
            return Layout(order, batch - count, count, weight)
        return Layout(torch.cat([sequence(batch, device), order[:count]]), batch, count, weight)
