"""MixupE's loss: L = η̂ (L_mix + γ L_clean + η R), R = w · mean penalty(q̂), q̂ = H - CE   (Zou et al., UAI 2023, eq. 5, 7-9).

γ = 0 is the paper's; γ L_clean is RegMixup's term (Pinto et al., NeurIPS 2022).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, debug, ops
from ..conventions import accumulate_dtype, rewritten, scalar
from ..ops import LossArguments
from ..ops import ranks as over_ranks
from ..ops.ranks import Ranks
from ..target import Parsed, as_scalar, check_multilabel, is_composed, parse, renamed
from .composed import composed_loss
from .options import LossParts, Options
from .ranks import ClassShards, Over, StepRows


def _check_inplace(logits: Tensor, transformed: bool) -> None:
    if transformed:
        raise ValueError("inplace_backward must be False under a transform of torch.func")
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace_backward must be False for logits that are a leaf: their values would be overwritten")
    if logits.dim() != 2 or logits.stride(-1) != 1:
        raise ValueError(
            "inplace_backward must be False for logits that are not (N, C) with adjacent classes, got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}"
        )


def _loss(
    logits: Tensor,
    target: Tensor | tuple,
    parsed: Parsed,
    eta: Tensor,
    options: Options,
    q: Tensor | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(loss, parts), by one fused operator, or by the composition where more than the logits is differentiated.

    Parts are None under a transform of torch.func, whose tensors are not to be looked at after it, and for an exported
    program, which keeps nothing on a module.
    """
    if options.of_loss.sigmoid:
        check_multilabel(parsed.target)
    if options.inplace_backward:
        _check_inplace(logits, parsed.transformed)
    arguments = parsed.arguments(eta, options)
    if ranks is not None:
        return _loss_over_ranks(target, parsed, arguments, options, q, ranks)
    try:
        composed = parsed.transformed or q is not None or options.function is not None or is_composed(parsed.target)
        if debug.ON:
            debug.ran("loss", "composed" if composed else "fused")
        if composed:
            loss, parts = composed_loss(parsed.rows, parsed.target, arguments, options.function, q)
        else:
            loss, parts = ops.fused_loss(parsed.rows, parsed.target, arguments, options.inplace_backward)
    except (RuntimeError, TypeError, ValueError) as error:
        raise renamed(error, target) from None
    return loss, None if parsed.transformed or ops.is_exporting() else parts


def _loss_over_ranks(
    target: Tensor | tuple, parsed: Parsed, arguments: LossArguments, options: Options, q: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The loss of rows, or of classes, that other ranks have, too: fused where only rows are theirs and logits are learned."""
    if options.inplace_backward:
        raise ValueError("inplace_backward must be False where other ranks have rows or classes, too, got True")
    if isinstance(ranks.merge, StepRows):
        arguments = ranks.merge.share_of(arguments)
    more = ranks.shard is not None or q is not None or options.function is not None or is_composed(parsed.target)
    composed = more or torch.compiler.is_compiling()
    if debug.ON:
        debug.ran("loss", f"{'composed' if composed else 'fused'}, over ranks")
    try:
        if not composed:
            return over_ranks.fused_loss(parsed.rows, parsed.target, arguments, ranks.merge)
        return composed_loss(parsed.rows, parsed.target, arguments, options.function, q, ranks)
    except (RuntimeError, TypeError, ValueError) as error:
        raise renamed(error, target) from None


def mixupe_loss(
    logits: Tensor,
    target: Tensor | tuple,
    *,
    eta: float | Tensor,
    clean_weight: float = 0.0,
    penalty: str | Callable[[Tensor], Tensor] = "abs",
    rescale: bool = True,
    threshold: float = 1.0,
    label_smoothing: float = 0.0,
    activation: str = "softmax",
    inplace_backward: bool = False,
    class_dim: int = -1,
    process_group: Any = None,
    class_shards: ClassShards | None = None,
    step: StepRows | None = None,
) -> Tensor:
    r"""The loss of MixupE: L = η̂ (L_mix + γ L_clean + η R), R = w · mean penalty(q̂), as one fused forward and backward.

    L_mix is the mean cross-entropy of the first ``target.num_mixed`` rows, L_clean of all others, the clean ones; R is
    taken on the last ``target.num_reg``, with w = ``target.reg_weight`` (eq. 7). With L₀ = L_mix + γ L_clean,
    η̂ = \|L₀\| / \|L₀ + η R\| is a constant to autograd (eq. 9), and 1 where its denominator is 0. Rows whose label is
    -100 leave all three means; a mean over no rows is 0. For the backward, two floats a row are kept beside the arguments
    (on the CPU, for logits of up to 16 MiB, the gradient itself, made in the forward; each thread that calls this with
    bfloat16 logits, or with up to 16 classes, keeps up to 4 MiB to make it in).

    Args:
        logits: (N, ..., C) of dtype float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
        target: :class:`MixedTarget`, whose λ is one a sample or one a label. Class indices (N, ...), soft targets of the
            logits' shape, and ``(labels, partner_labels, lam)`` stand for cross-entropy on every row, without R.
        eta: η >= 0, a number or a 0-d tensor on the device (which a CUDA graph reads afresh at every replay).
        clean_weight: γ >= 0, the weight of the clean rows' cross-entropy; 0 is the paper's loss, and with η = 0 any other
            is RegMixup. Every row counts once if γ is the ``clean_fraction`` ρ, or ρ / (1 - ρ) with ``split=True``. It must
            be 0 for ``MixupE(regularize="mixed")``, which has no clean rows; with :class:`Mixup`, and in steps without
            clean rows, it weighs nothing.
        penalty: ``"abs"``, eq. 7; ``"threshold"``, R = -w·Σ_{q̂ < t} q̂ / n, or ``"linear_detached"``,
            R = -w·mean((y - p).detach()ᵀz), which the authors' public code runs as versions 3 and 4; or a function of
            the (n,) values q̂ that returns (n,) values to average. They do not push the same way: see :class:`MixupELoss`.
        rescale: False leaves η̂ at 1.
        threshold: t of ``"threshold"``.
        label_smoothing: in [0, 1]; of all terms.
        activation: ``"softmax"``, or ``"sigmoid"`` for multi-label models with floating-point labels, where
            cross-entropy is the sum over classes of the binary ones.
        inplace_backward: write the gradient over the logits instead of into a new tensor: N·C elements less at the
            peak. The logits hold their own gradient afterwards. Autograd refuses to go on if another operation needs
            their values; leaves and second derivatives are refused here. torch.compile, which plans its memory itself,
            leaves the logits alone.
        class_dim: the classes' dimension, of logits and soft targets: 1 for images of logits (N, C, H, W) with (N, H, W)
            labels, as in :func:`torch.nn.functional.cross_entropy`. Logits with another than the last are copied.
        process_group: a :class:`torch.distributed.ProcessGroup` whose ranks have other rows: means and η̂ are those of all
            rows, by one all-reduce of six numbers, and so is the loss, on every rank. The gradient is that of the loss times
            the number of ranks, since DistributedDataParallel and FSDP take the mean of the ranks' gradients. Every rank of
            the group must call it, one without rows, too.
        class_shards: :class:`ClassShards`, where each rank has the logits (N, own) of its classes alone. Class indices are of
            all classes; soft labels are (N, own), or (N, C), which are cut. One all-gather of four floats a row; the backward
            asks no other rank. A DTensor of placement ``Shard(-1)`` says it itself. Targets are constants then, and
            there is no second derivative.
        step: :class:`StepRows`, where a step has several micro-batches.

    Returns:
        0-d loss, float32 (float64 for float64 logits), differentiable any number of times, in reverse and forward mode and
        under torch.func, in the logits, in soft targets and in λ. η̂ is a constant in every derivative.

    Raises:
        TypeError, ValueError: as :func:`ce_entropy`, and for an option that is not as stated.
    """
    options = Options.check(
        clean_weight, penalty, rescale, threshold, label_smoothing, activation, inplace_backward, class_dim
    )
    ranks = None
    if process_group is not None or class_shards is not None or step is not None or type(logits) is not Tensor:
        over = Over(process_group, class_shards, step).check()
        logits, target, ranks = over.ranks(logits, target, class_dim)
    parsed = parse(logits, target, class_dim)
    return _loss(logits, target, parsed, as_scalar("eta", eta, logits), options, None, ranks)[0]


@checks.named_arguments(
    {
        "smoothing": "label_smoothing=",
        "gamma": "clean_weight=",
        "alpha": "it as an argument of MixupE",
        "clean_fraction": "it as an argument of MixupE",
        "weight": "no weights of classes: mixupe_kernels.ce_entropy takes class_weight",
        "reduction": "nothing: the loss is the mean over the rows",
        "ignore_index": "nothing: labels of -100 are ignored",
    }
)
class MixupELoss(nn.Module):
    """:func:`mixupe_loss` as a criterion, in the place of timm's ``SoftTargetCrossEntropy``.

    Start with ``MixupE(clean_fraction=1/4)`` and ``MixupELoss(clean_weight=1/4)``, and with :func:`split_batch_norm` if the
    model has BatchNorm: mixup with a quarter of clean rows, whose cross-entropy makes most of the gain.

    What R adds, on the clean rows where q̂ = H - CE > 0, which after the first epochs are most of them:

    - ``"abs"``, the paper's, lowers H - CE. That is 0 for predictions that are certain and right, and for uniform ones: rows
      that are confident become more so, others less.
    - ``"threshold"``, of the authors' README command, raises H - CE up to the threshold: the opposite push.
    - ``"linear_detached"`` lowers CE: its gradient is that of ``clean_weight=η·w`` without R.

    At the paper's η = 1e-3 R has less than a thousandth of the gradient of L_mix, and no effect that can be measured. An η of 10
    ends in uniform predictions, whose R is 0: watch ``last.mix_loss`` if η is large.

    Args:
        eta: η >= 0, the regularizer's strength; the paper uses 1e-4 to 0.1, mostly 1e-3. May be set at any time,
            also between a loss and its backward, which is of the η that was.
        clean_weight, penalty, rescale, threshold, label_smoothing, activation, inplace_backward, class_dim: as for
            :func:`mixupe_loss`.
        process_group, class_shards: as for :func:`mixupe_loss`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.

    Calling it with logits and a target returns the 0-d loss. ``step=`` is as for :func:`mixupe_loss`. A third argument ``q`` (n,) takes the place of q̂:
    :func:`exact_q` of the clean rows, which then need not be in the batch (``MixupE(regularize="mixed")`` adds none).
    After a call ``last`` holds its ``mix_loss``, ``clean_loss``, ``reg`` and ``eta_hat`` as detached 0-d tensors on the
    device.
    """

    def __init__(
        self,
        eta: float = 1e-3,
        penalty: str | Callable[[Tensor], Tensor] = "abs",
        *,
        clean_weight: float = 0.0,
        rescale: bool = True,
        threshold: float = 1.0,
        label_smoothing: float = 0.0,
        activation: str = "softmax",
        inplace_backward: bool = False,
        class_dim: int = -1,
        process_group: Any = None,
        class_shards: ClassShards | None = None,
    ):
        super().__init__()
        self._eta: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.eta = eta
        self.penalty = penalty
        self.options = Options.check(
            clean_weight, penalty, rescale, threshold, label_smoothing, activation, inplace_backward, class_dim
        )
        over = Over(process_group, class_shards).check()
        self._over = None if over == Over() else over
        self._last: list[Tensor | None] = [None]  # no attribute of its own: nn.Module takes 2 µs to set one to a tensor

    @property
    def eta(self) -> float:
        """η. Setting it rewrites the tensors that steps already captured in CUDA graphs read."""
        return self._eta_value

    @eta.setter
    def eta(self, value: float) -> None:
        self._eta_value = checks.non_negative("eta", value)
        # On the CPU a new one is made: another backward of an earlier loss needs the old.
        self._eta = {key: tensor.fill_(self._eta_value) for key, tensor in self._eta.items() if not tensor.is_cpu}

    @property
    def clean_weight(self) -> float:
        """γ. It may be set between steps; a CUDA graph keeps the one it was captured with."""
        return self.options.of_loss.clean_weight

    @clean_weight.setter
    def clean_weight(self, value: float) -> None:
        value = checks.non_negative("clean_weight", value)
        self.options = self.options._replace(of_loss=self.options.of_loss._replace(clean_weight=value))

    @property
    def last(self) -> LossParts | None:
        """``mix_loss``, ``clean_loss`` (L_clean itself, whatever γ is), ``reg`` and ``eta_hat`` of the last call; None before the
        first, and after one under a transform of torch.func."""
        parts = self._last[0]
        return None if parts is None else LossParts(*parts[:4].unbind())

    def forward(
        self, logits: Tensor, target: Tensor | tuple, q: Tensor | None = None, *, step: StepRows | None = None
    ) -> Tensor:
        ranks = None
        if self._over is not None or step is not None or type(logits) is not Tensor:
            over = (self._over or Over())._replace(step=step).check()
            logits, target, ranks = over.ranks(logits, target, self.options.class_dim)
        parsed = parse(logits, target, self.options.class_dim)
        key = logits.device, logits.dtype
        eta = self._eta.get(key)
        if eta is None:
            make = functools.partial(self._make_eta, *key)
            eta = rewritten(self._eta, key, logits.device, make, "a MixupELoss")
        loss, self._last[0] = _loss(logits, target, parsed, eta, self.options, q, ranks)
        return loss

    def _make_eta(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return scalar(self._eta_value, accumulate_dtype(dtype), device)

    def extra_repr(self) -> str:
        weights = f"eta={self.eta:g}, clean_weight={self.clean_weight:g}"
        return f"{weights}, penalty={self.penalty!r}, rescale={self.options.of_loss.rescale}"
