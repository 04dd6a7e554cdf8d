"""The batch the model sees: mixed rows first, clean rows after them, in one tensor with one target.

``Mixup`` draws λ and partners, and mixes; ``MixupE`` (``mixupe``) appends the clean rows that the regularizer is taken
on. Both stand where ``timm.data.Mixup`` or ``torchvision.transforms.v2.MixUp`` stand in a loop.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import checks, ops
from ..conventions import accumulate_dtype, is_capturing, row_format
from ..target import MixedTarget, check_labels
from . import cutmix, inputs, sampling
from . import state as saved_state
from .names import ELSEWHERE
from .plan import CleanRows, Draw, Plan, one, plain_draw
from .ranks import exchanged
from .schedule import LinearRamp


def write(draw: Draw, x: Tensor, arguments: inputs.Arguments, out: Tensor | None) -> Tensor:
    """The N rows that were drawn, made of the samples ``x`` in one pass, into fresh memory or into ``out``."""
    scale, shift, dtype, memory_format = arguments
    rows = draw.target.lam.shape[0]
    if out is not None and out.shape[0] != rows:
        out = out[:rows]
    if draw.plain and out is None and scale is None and dtype in (None, x.dtype):
        return x if memory_format is None else x.contiguous(memory_format=memory_format)
    if x.dtype is torch.uint8 and dtype is None:
        values = write(draw, x, arguments._replace(dtype=torch.float32), None).round_().to(torch.uint8)
        return values if out is None else out.copy_(values)
    if draw.box is not None and draw.box.dim() == 2:  # one for each row, where the operator takes one a batch
        whole = draw._replace(box=None)
        others = write(whole._replace(lam=torch.zeros_like(draw.target.lam)), x, arguments, None)
        values = torch.where(cutmix.inside(draw.box, others), others, write(whole, x, arguments, None))
        return values if out is None else out.copy_(values)
    if draw.offsets is not None:
        if arguments != inputs.UNCHANGED:
            # A pass of its own: the sum over samples takes weights, not a transform.
            x = ops.call(ops.mix_op, x, None, one(x.device).to(accumulate_dtype(x.dtype)), None, *arguments)
        mixed = ops.call(ops.gather_sum_op, x, draw.partner, draw.lam.to(accumulate_dtype(x.dtype)), draw.offsets)
        return mixed.contiguous(memory_format=row_format(x))
    lam = draw.lam.double() if x.dtype is torch.float64 else draw.lam
    if out is None:
        return ops.call(ops.mix_op, x, draw.partner, lam, draw.rows, *arguments, draw.box)
    ops.call(ops.mix_out_op, x, draw.partner, lam, draw.rows, scale, shift, draw.box, out=out)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # a graph that saved what it held must not go on with these values
    return out


@checks.named_arguments(ELSEWHERE)
@dataclass(eq=False, repr=False)
class Mixup:
    """Plain mixup of a batch and its labels (Zhang et al., 2018), our baseline: :class:`MixupE` without clean rows.

    Args:
        alpha, beta: λ ~ Beta(alpha, beta), > 0; beta is alpha if None. alpha may be a :class:`LinearRamp` over epochs. An
            alpha of 0 is λ = 1, no mixing.
        per_sample: draw one λ for each sample instead of one for the batch; ``"pair"``, with ``pairing="flip"``, one for each
            sample and its partner.
        pairing: whom a sample is mixed with: ``"random"`` permutation, ``"flip"`` (B - 1 - i, as timm), ``"roll"``
            (i - 1, as torchvision), ``"derangement"`` (random, never itself), ``"same_class"``, ``"different_class"``,
            or a function such as :class:`mixupe_kernels.pairing.Neighbors`. ``"across_ranks"``: a random permutation of the
            samples of all ranks of the default process group, which exchange them in one all-to-all; for small batches. Every
            rank calls then, with as many samples, in the main process, outside of compiled code; ``seed`` must be given. The
            batch is copied once.
        prob: probability that a batch (a sample, with ``per_sample``) is mixed at all, in [0, 1].
        lam_distribution: where λ comes from instead of Beta(alpha, beta): one of :mod:`mixupe_kernels.sampling`, or a
            function (see :class:`mixupe_kernels.sampling.Custom`).
        num_samples: mix K >= 2 samples, with weights ~ Dirichlet(alpha, ..., alpha) (mixup, §2). Above 2 the target is
            dense, class labels need ``num_classes``, and ``out`` is not taken. Ignored labels (-100) leave the loss with their
            weights, as with two: the target of classes has λ, the share of a row's weights that stays, and partner_labels of -100.
        num_classes: C, for ``num_samples`` > 2.
        cutmix_alpha: alternate with CutMix (Yun et al., 2019) of λ ~ Beta(cutmix_alpha, cutmix_alpha), > 0; never if
            None. One box a batch, or a sample with ``per_sample``, which takes three passes; λ is corrected to its true area.
        switch_prob: probability of CutMix where ``cutmix_alpha`` is given, in [0, 1].
        mean, std: normalise the channels (dimension 1), x → (x - mean) / std as torchvision's ``Normalize``, in the same
            pass. uint8 is scaled to [0, 1] first.
        dtype: of the batch returned; x's if None, but float32 for uint8 with mean and std. uint8 with a dtype is scaled to
            [0, 1]; with neither it stays uint8, mixed and rounded, for loaders that normalise afterwards.
        memory_format: of the batch returned; x's if None.
        inplace: mix in the memory of x, which is then what is returned. Only for ``pairing="flip"`` without clean
            rows, and for x that needs no gradient and keeps its dtype.
        keys: which entries of a dict, tuple or list are mixed. By default every floating-point tensor, and every uint8
            tensor of 4 or 5 dimensions, that has one row for each label.
        follow: which other entries have one row for each sample, such as ids or attention masks, and take those of the rows
            that are made, a row having its own sample's. By default every tensor, array, list or tuple of as many rows as
            labels that is not mixed; () for none.
        labels_key: the entry of a dict that holds the labels.
        warmup_epochs: plain samples in the epochs before this one (mixup, §3.3).
        off_epoch: plain samples from this epoch on; never if None.
        generator: source of randomness, on the batch's device; torch's default for the device if None. A CUDA graph
            that is to draw from it has to be told, before it is captured: ``graph.register_generator_state(generator)``.
        seed: an int, in place of ``generator``: each rank draws from a stream of its own, which begins with this number, the
            rank and the epoch (:meth:`set_epoch`). Make the mixer after the process group, if torchrun did not start it.
        same_draws: let all ranks draw the same from ``seed``, for models whose ranks see the same batch.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value, or two that exclude each other.

    Calling it with ``x`` (B, ...), floating point or uint8 in any layout, and ``labels``, (B,) int64, (B, C) soft, or a map
    of classes, (B, H, W) or (B, T) int64, returns ``(x, MixedTarget)``. CutMix cuts a map of the images' size with their
    box. Plain samples are normalised and cast, too. Further arguments of the call:

    - ``x`` may be a tuple, list or dict, whose tensors are mixed with one λ and one partner; other entries that have one
      row for each sample follow the rows, and what is left stays the same object. mean, std and memory_format then apply
      to the tensors of 4 or 5 dimensions. Labels may be an entry of a dict, which holds the target afterwards.
    - ``out``: a buffer, or a tuple, list or dict of them, of at least ``num_rows(B)`` rows. Its first rows are written
      and returned instead of fresh memory, whose first touch costs more than mixing does.
    - ``ids``: (B,) int64, the samples' numbers in the data set, for pairings that ask for them.

    Setting ``enabled`` to False makes it return plain samples. ``set_epoch`` drives warm-up, off_epoch and ramps;
    ``state_dict`` holds what a resumed run needs to draw the same batches.

    A call may be captured in a CUDA graph after one that was not. Each replay draws afresh, and reads what ``set_epoch`` made
    of ramps since. ``steps`` counts the call that was captured alone, and the graph keeps what that was: a regularized batch of
    its ``interval`` or not, mixed or plain.

    In the collate function of a data loader, the workers' copies follow: what ``set_epoch`` and ``enabled`` were told in
    the main process holds for every batch that a worker begins afterwards, ``steps`` counts the batches of all workers,
    and each regularizes every ``interval``-th of its own: one batch in ``interval`` of all, though not at the places where a
    single process has them. A ``generator`` becomes, in each worker, a stream seeded by it
    and by the worker's seed, which differs from epoch to epoch; so a run repeats where torch's seed is set, too.
    """

    alpha: float | LinearRamp = 1.0
    _: KW_ONLY
    beta: float | None = None
    per_sample: bool | str = False
    pairing: str | Callable[..., Tensor] = "random"
    prob: float = 1.0
    lam_distribution: sampling.Distribution | sampling.Dirichlet | Callable[..., Tensor] | None = None
    num_samples: int = 2
    num_classes: int | None = None
    cutmix_alpha: float | cutmix.Boxes | None = None
    switch_prob: float = 0.5
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    inplace: bool = False
    keys: Sequence[Hashable] | None = None
    follow: Sequence[Hashable] | None = None
    labels_key: Hashable = "labels"
    warmup_epochs: float = 0
    off_epoch: float | None = None
    generator: torch.Generator | None = None
    seed: int | None = None
    same_draws: bool = False

    def __post_init__(self) -> None:
        checks.boolean("inplace", self.inplace)
        hash(self.labels_key)
        self.plan = Plan(self, self._clean_rows())
        self.transform = inputs.Transform(self.mean, self.std, self.dtype, self.memory_format)
        if self.inplace and (self.pairing != "flip" or self.num_samples > 2):
            raise ValueError("inplace must be False unless pairing is 'flip', without num_samples, got True")
        for name, keys in (("keys", self.keys), ("follow", self.follow)):
            if keys is not None and (isinstance(keys, str) or not isinstance(keys, Sequence)):
                raise TypeError(f"{name} must be a sequence of keys or None, got {type(keys).__name__} {keys!r}")
        twice = set(self.keys or ()) & set(self.follow or ())
        if twice:
            raise ValueError(f"follow must name other entries than keys, got {', '.join(map(repr, twice))} in both")
        self.lam_distribution = self.plan.law  # the one in use: a ramp of alpha changes it
        self._complete = True

    def _clean_rows(self) -> CleanRows | None:
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would change nothing: a name with a typo, or an argument that the constructor has used already."""
        if "_complete" in vars(self) and not isinstance(getattr(type(self), name, None), property):
            kind = type(self).__name__
            if name in {field.name for field in fields(self)}:
                raise AttributeError(f"{name} of a {kind} is fixed by its constructor, make another one")
            settable = [key for key in dir(self) if isinstance(getattr(type(self), key, None), property)]
            raise AttributeError(f"a {kind} has no attribute {name!r} to set; it has {', '.join(settable)}")
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "generator"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, generator=None if state["plan"].seeds else state["plan"].generator)

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "lam_distribution" and self.plan.given_law is None:
                continue
            if field.name == "alpha":
                shown.append(repr(value))
            elif isinstance(value, torch.Generator):
                shown.append(f"generator=<{value.device}, seed {value.initial_seed()}>")
            elif value is not field.default and not (type(value) is type(field.default) and value == field.default):
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def enabled(self) -> bool:
        """Whether batches are mixed where the schedule says so; set it to False for plain samples."""
        return self.plan.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.plan.set_enabled(value)

    @property
    def mixup_enabled(self) -> bool:
        """timm's name of :attr:`enabled`."""
        return self.enabled

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self.enabled = value

    @property
    def steps(self) -> int:
        """Batches drawn so far, those of data loaders' workers among them."""
        return self.plan.progress.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.plan.progress.set_steps(checks.integer("steps", value, 0), [])

    @property
    def epoch(self) -> float:
        """What :meth:`set_epoch` was given last."""
        return self.plan.epoch

    @property
    def active(self) -> bool:
        """Whether batches are mixed now: ``enabled``, after the warm-up and before ``off_epoch``."""
        return self.plan.active

    def set_epoch(self, epoch: float) -> None:
        """Say where training is, before an epoch's first batch or within it: a number >= 0, possibly fractional."""
        self.plan.set_epoch(epoch)
        object.__setattr__(self, "lam_distribution", self.plan.law)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of batches drawn, ``enabled``, and the state of the generator.

        Without a generator of its own it draws from torch's, whose state the run has to keep (``torch.get_rng_state``). With
        ``seed``, a rank that loads its own state draws the same batches; a state of another rank, or of another number of
        ranks, goes on with the epoch and the count, and with fresh draws.
        """
        return saved_state.state_dict(self.plan)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken: the same batches are drawn.

        Raises:
            TypeError, ValueError: if entries are missing or of another kind, only one of the two has a generator of its own,
                or a ``generator`` is loaded on another number of ranks. Nothing is changed then.
        """
        saved_state.load_state_dict(self.plan, state)
        object.__setattr__(self, "lam_distribution", self.plan.law)

    def draw(self, labels: Tensor, *, ids: Tensor | None = None, image_size: tuple[int, int] | None = None) -> Draw:
        """λ, partners, rows and target of a batch with these labels.

        Args:
            labels: (B,) int64, (B, C) soft or (B, ...) int64 maps of classes, on the device of the generator.
            ids: (B,) int64, the samples' numbers, for pairings that ask for them.
            image_size: height and width, which CutMix needs.
        """
        checks.tensor("labels", labels)
        check_labels(labels, labels.shape[0] if labels.dim() else 0, labels)
        if ids is not None:
            checks.ids(ids, labels)
        with self._restored_on_error(None, labels.device):
            return self.plan.draw(labels, ids=ids, image_size=image_size)

    def num_rows(self, batch: int) -> int:
        """The most rows that a batch of ``batch`` samples becomes, which is what ``out`` must have."""
        return checks.integer("batch", batch, 0)

    def apply(self, draw: Draw, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The rows that :meth:`draw` chose, of any samples (B, ...) such as hidden states, as they are: (N, ...).

        Differentiable in x; with ``out``, x must not require a gradient. mean, std, dtype and memory_format are left out. A
        draw of CutMix is for images of the size it was drawn for.
        """
        if not isinstance(draw, Draw):
            raise TypeError(f"draw must be what Mixup.draw returned, got {type(draw).__name__}")
        checks.tensor("x", x)
        if x.dim() == 0 or x.shape[0] != draw.batch:
            raise ValueError(f"x must have the {draw.batch} rows that were drawn for, got shape {tuple(x.shape)}")
        if x.dtype is not torch.uint8:
            checks.dtype("x", x, checks.LOGITS_DTYPES)
        checks.same_device("x", x, "draw", draw.lam)
        if out is not None:
            checks.no_gradient("out", x=x, out=checks.tensor("out", out))
        return write(draw, x, inputs.UNCHANGED, out)

    def __call__(
        self,
        x: Tensor | Sequence | Mapping,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        out: Tensor | Sequence | Mapping | None = None,
    ) -> tuple[Any, MixedTarget]:
        return self._batch(x, labels, ids, out, self.plan.draw)

    def plain(self, x: Tensor | Sequence | Mapping, labels: Tensor | None = None) -> tuple[Any, MixedTarget]:
        """The samples as they are, normalised and cast as for the model: what a call returns with ``enabled`` False."""
        return self._batch(x, labels, None, None, plain_draw)

    def _batch(self, x, labels, ids, out, draw: Callable[..., Draw]) -> tuple[Any, MixedTarget]:
        """Check everything, then draw, then write."""
        if not isinstance(x, Tensor):
            return self._batch_of_several(x, labels, ids, out, draw)
        if x.dim() == 0:
            raise ValueError("x must have a batch dimension, got a 0-d tensor")
        if x.layout is not torch.strided or x.is_nested:
            checks.strided("x", x)
        check_labels(labels, x.shape[0], x)
        if ids is not None:
            checks.ids(ids, labels)
        arguments = inputs.UNCHANGED
        if x.dtype not in checks.LOGITS_DTYPES or not self.transform.is_identity:
            arguments = self.transform.arguments("x", x, True)
        if out is not None or self.inplace:
            out = inputs.check_out(self, "out", out, x, arguments)
        size = None if self.cutmix_alpha is None else inputs.image_size([x])
        unsure = self.plan.careful or out is not None
        with self._restored_on_error(out, x.device) if unsure else nullcontext():
            if self.plan.across:
                (x,), draw = exchanged(self.plan, draw, [x], labels)
            drawn = draw(labels, ids=ids, image_size=size)
            return write(drawn, x, arguments, out), drawn.target

    def _batch_of_several(self, x, labels, ids, out, draw: Callable[..., Draw]) -> tuple[Any, MixedTarget]:
        if not isinstance(x, (Mapping, tuple, list)):
            raise TypeError(f"x must be a tensor, or a tuple, list or dict of tensors, got {type(x).__name__}")
        within = False
        if labels is None and isinstance(x, Mapping):
            within = True
            if self.labels_key not in x:
                raise ValueError(f"labels must be given, or be the entry {self.labels_key!r} of x, got {list(x)}")
            labels = x[self.labels_key]
        checks.tensor("labels", labels)
        batch = labels.shape[0] if labels.dim() else 0
        not_mixed = (self.labels_key, *(self.follow or ()))
        entries = inputs.entries_to_mix(x, batch, self.keys, not_mixed)
        following = {}
        if self.plan.clean is not None and not self.plan.clean.mixed:
            others = {*entries, self.labels_key} if within else entries
            following = inputs.entries_that_follow(x, batch, self.follow, others, labels)
        check_labels(labels, batch, next(iter(entries.values())))
        if ids is not None:
            checks.ids(ids, labels)
        buffers = inputs.buffers(out, entries)
        prepared: dict[Hashable, tuple] = {}
        for key, value in entries.items():
            checks.same_device(f"x[{key!r}]", value, "labels", labels)
            arguments = self.transform.arguments(f"x[{key!r}]", value, value.dim() in inputs.FORMATS.values())
            prepared[key] = (value, arguments, inputs.check_out(self, f"out[{key!r}]", buffers[key], value, arguments))
        size = None if self.cutmix_alpha is None else inputs.image_size(entries.values())
        with self._restored_on_error(out, labels.device):
            if self.plan.across:
                values, draw = exchanged(self.plan, draw, [value for value, *_ in prepared.values()], labels)
                prepared = {
                    key: (value, *rest) for (key, (_, *rest)), value in zip(prepared.items(), values, strict=True)
                }
            drawn = draw(labels, ids=ids, image_size=size)
            changes: dict = {key: write(drawn, *arguments) for key, arguments in prepared.items()}
        if drawn.rows is not None:
            changes |= {key: inputs.rows_of(value, drawn.rows) for key, value in following.items()}
        if within:
            changes[self.labels_key] = drawn.target
        return inputs.replaced(x, changes), drawn.target

    def _restored_on_error(self, out: Any, device: torch.device) -> AbstractContextManager:
        """Give generators and counts back if something is refused once drawing begins: what a function returned, or a buffer.

        Nothing is drawn yet by a compiler, nor while a CUDA graph is captured, which lets no generator be read.
        """
        unsure = self.plan.careful or out is not None
        if unsure and not torch.compiler.is_compiling() and not is_capturing(device):
            return saved_state.restored_on_error(self.plan, device)
        return nullcontext()
