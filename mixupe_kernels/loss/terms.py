"""The terms that losses are made of: cross-entropy and entropy of each row, and q̂, by one pass over the logits."""

from typing import NamedTuple

from torch import Tensor

from .. import checks, ops
from ..conventions import IGNORE_INDEX, accumulate_dtype
from ..ops import reference
from ..target import as_multilabel, as_rows, as_target

ACTIVATIONS = ("softmax", "sigmoid")


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
) -> CEEntropy:
    """Cross-entropy, entropy of the softmax and log-sum-exp of each row, in one pass over the logits.

    MixupE's q̂ (Zou et al., 2023, eq. 5) is entropy - ce; plain mixup, RegMixup, the confidence penalty and z-loss are
    other one-line expressions of the three. All are differentiable, any number of times, in the logits, in soft
    targets and in λ, under torch.func too, where ``vmap`` loops over what it maps; for the backward two floats a row are
    kept beside the arguments. Forward mode (``jvp``) is refused.

    Args:
        logits: (..., C) of dtype float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
            Rows need not be adjacent; a last dimension that is not contiguous is copied.
        target: :class:`MixedTarget`, (...) int64 class indices, or (..., C) soft targets (copied to float32 unless they
            are). They need not sum to 1.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: label that adds nothing: a row of such labels only has ce 0. Index targets only.
        class_weight: (C,) weight of each class in ce, as ``weight`` in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        ``(ce, entropy, lse)``, each of shape (...) in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape, device or number, or a label outside [0, C). On CUDA, labels are checked on the
            device, without synchronising.
    """
    rows = as_rows(logits)
    parts = as_target(target, logits)
    if class_weight is not None:
        checks.tensor("class_weight", class_weight)
        checks.shape("class_weight", class_weight, logits.shape[-1:])
        checks.same_device("class_weight", class_weight, "logits", logits)
        class_weight = class_weight.to(accumulate_dtype(logits.dtype))
    smoothing = checks.fraction("label_smoothing", label_smoothing)
    outputs = ops.call(ops.ce_entropy_op, rows, *parts, class_weight, smoothing, ignore_index, False)
    return CEEntropy(*(output.view(logits.shape[:-1]) for output in outputs))


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
    rows = as_rows(logits)
    parts = as_multilabel(as_target(target, logits))
    ce, entropy, _ = ops.call(ops.ce_entropy_op, rows, *parts, None, 0.0, IGNORE_INDEX, True)
    return BCEEntropy(ce.view(logits.shape[:-1]), entropy.view(logits.shape[:-1]))


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
    rows = as_rows(logits)
    target = as_target(target, logits)
    if sigmoid:
        as_multilabel(target)
    outputs = ops.call(ops.ce_entropy_op, rows, *target, None, 0.0, IGNORE_INDEX, sigmoid)
    return reference.q_hat(*outputs, target.target, sigmoid).view(logits.shape[:-1])
