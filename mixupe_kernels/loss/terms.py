"""The terms that losses are made of: cross-entropy and entropy of each row, and q̂, by one pass over the logits."""

from typing import NamedTuple

from torch import Tensor

from .. import checks, ops
from ..conventions import accumulate_dtype
from ..ops import RowOptions, ranks, reference
from ..ops.ranks import ClassShard
from ..target import check_multilabel, parse, renamed
from .options import ACTIVATIONS
from .ranks import ClassShards, Over, localized


class CEEntropy(NamedTuple):
    """Per row: cross-entropy, entropy of the prediction, log-sum-exp of the logits."""

    ce: Tensor
    entropy: Tensor
    lse: Tensor


def ce_entropy(
    logits: Tensor,
    target: Tensor | tuple,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    class_dim: int = -1,
    class_shards: ClassShards | None = None,
) -> CEEntropy:
    """Cross-entropy, entropy of the softmax and log-sum-exp of each row, in one pass over the logits.

    MixupE's q̂ (Zou et al., 2023, eq. 5) is entropy - ce; plain mixup, RegMixup, the confidence penalty and z-loss are
    other one-line expressions of the three. All are differentiable, any number of times, in reverse and forward mode and
    under torch.func, in the logits, in soft targets and in λ; for the backward two floats a row are kept beside the
    arguments.

    Args:
        logits: (..., C) of dtype float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
            Rows need not be adjacent; a last dimension that is not contiguous is copied.
        target: :class:`MixedTarget`, ``(labels, partner_labels, lam)``, (...) int64 class indices, or (..., C) soft targets
            (copied to float32 unless they are), which need not sum to 1.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: label that adds nothing: a row of such labels only has ce 0. Index targets only.
        class_weight: (C,) weight of each class in ce, as ``weight`` in :func:`torch.nn.functional.cross_entropy`; a
            constant.
        class_dim: the classes' dimension, of logits and soft targets: 1 for (B, C, H, W) logits with (B, H, W) labels.
            Logits with another than the last are copied.
        class_shards: as for :func:`mixupe_loss`; ``class_weight`` is of all classes, or of the own. The gradient in the
            logits is that of one loss, the same on every rank; there is no second derivative.

    Returns:
        ``(ce, entropy, lse)``, each of shape (...) in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, device or number, or a label outside [0, C). On CUDA, labels are checked on the
            device, without synchronising.
    """
    checks.tensor("logits", logits)
    class_dim = checks.integer("class_dim", class_dim)
    logits, target, shard = localized(logits, target, Over(class_shards=class_shards).check().class_shards, class_dim)
    if class_weight is not None:
        checks.tensor("class_weight", class_weight)
        checks.dtype("class_weight", class_weight, checks.LOGITS_DTYPES)
        checks.same_device("class_weight", class_weight, "logits", logits)
        if class_weight.requires_grad:
            raise ValueError("class_weight must not require a gradient: ce is not differentiable in it")
        class_weight = class_weight.to(accumulate_dtype(logits.dtype))
        if shard is not None and class_weight.shape == (shard.classes,):
            class_weight = class_weight[shard.first : shard.first + shard.own]
    smoothing = checks.fraction("label_smoothing", label_smoothing)
    options = RowOptions(class_weight, smoothing, checks.integer("ignore_index", ignore_index))
    _, outputs, shape = _of_rows(logits, target, options, class_dim, shard)
    return CEEntropy(*(output.view(shape) for output in outputs))


def _of_rows(
    logits: Tensor,
    target: Tensor | tuple,
    options: RowOptions,
    class_dim: int = -1,
    shard: ClassShard | None = None,
) -> tuple:
    """(target as the operators take it; CE, H and lse of the flattened rows; their shape)."""
    parsed = parse(logits, target, class_dim)
    if options.sigmoid:
        check_multilabel(parsed.target)
    shape = list(logits.shape)
    shape.pop(class_dim)
    try:
        if shard is not None:
            outputs, row_target = ranks.ce_entropy(parsed.rows, parsed.target, options, shard)
            return row_target, outputs, shape
        return parsed.target, ops.ce_entropy(parsed.rows, parsed.target, options), shape
    except (RuntimeError, TypeError, ValueError) as error:
        raise renamed(error, target) from None


class BCEEntropy(NamedTuple):
    """Per row, summed over the classes: binary cross-entropy, entropy of the sigmoids."""

    ce: Tensor
    entropy: Tensor


def bce_entropy(logits: Tensor, target: Tensor | tuple) -> BCEEntropy:
    """Binary cross-entropy and entropy of each row of a sigmoid (multi-label) model, summed over its classes.

    BCE_i = Σ_k softplus(z_k) - y_k z_k and H_i = Σ_k softplus(z_k) - σ(z_k) z_k, so that again q̂ = entropy - ce
    (MixupE, eq. 5 with h = log(1 + e^f)).

    Args:
        logits: (..., C), as for :func:`ce_entropy`.
        target: (..., C) floating point, or a :class:`MixedTarget` with such labels.

    Returns:
        ``(ce, entropy)``, each of shape (...) in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: as :func:`ce_entropy`; class indices are refused.
    """
    _, outputs, shape = _of_rows(logits, target, RowOptions(sigmoid=True))
    return BCEEntropy(outputs.ce.view(shape), outputs.entropy.view(shape))


def q_hat(logits: Tensor, target: Tensor | tuple, *, activation: str = "softmax") -> Tensor:
    """q̂ = (y - p)ᵀz of each row, the first-order term of mixup at clean rows (MixupE, eq. 5).

    Args:
        logits: (..., C) of dtype float32, float64, bfloat16 or float16.
        target: :class:`MixedTarget`, (...) class indices or (..., C) soft targets, which need not sum to 1; floating
            point for ``"sigmoid"``.
        activation: p = ``"softmax"`` or, for multi-label models, ``"sigmoid"`` of the logits.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in the logits and soft targets.

    Raises:
        TypeError, ValueError: as :func:`ce_entropy`, or for an unknown activation.
    """
    sigmoid = checks.choice("activation", activation, ACTIVATIONS) == "sigmoid"
    row_target, outputs, shape = _of_rows(logits, target, RowOptions(sigmoid=sigmoid))
    return reference.q_hat(outputs, row_target, 0.0, sigmoid).view(shape)
