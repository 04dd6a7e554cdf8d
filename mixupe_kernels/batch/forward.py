"""The model's outputs on a batch of MixupE: in one call, or in two for models with batch statistics."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..target import MixedTarget


def forward_mixupe(
    model: Callable[[Tensor], Tensor], x: Tensor, target: MixedTarget, *, batched: bool = True
) -> Tensor:
    """Logits of all rows, the mixed ones and the clean ones in one call of the model or in a call each.

    The two forms give the same logits and gradients for a model that treats rows separately. They differ where it does
    not, which is BatchNorm in train mode (the authors' public code makes two calls):

    - normalisation: in one call every row is normalised by the statistics of mixed and clean rows together; in two, each
      kind by its own;
    - running statistics: one update a step, by the statistics of all rows, or two, by the mixed rows and then by the
      clean ones. The second weighs more: with momentum m the two enter with m(1 - m) and m, however few clean rows
      there are. Mixed rows vary less than clean ones, so with few clean rows the running variance comes out larger.

    One call is faster on a device that a single call does not fill. Dropout draws the same number of masks, in another
    order.

    Args:
        model: from (n, ...) to (n, C), or any output that can be concatenated along its first dimension.
        x: (N, ...) as :class:`MixupE` returns it: ``target.num_mixed`` mixed rows, then clean rows.
        target: the target that came with it.
        batched: one call; False makes two, where there are rows of both kinds.

    Returns:
        (N, C) logits for :class:`MixupELoss` with the same target.

    Raises:
        TypeError, ValueError: if ``target`` is not a MixedTarget, or has another number of rows than ``x``.
    """
    checks.tensor("x", x)
    if not isinstance(target, MixedTarget):
        raise TypeError(f"target must be a MixedTarget, got {type(target).__name__}")
    checks.shape("x", x, (target.labels.shape[0], *x.shape[1:]))
    if batched or target.num_mixed in (0, x.shape[0]):
        return model(x)
    return torch.cat([model(x[: target.num_mixed]), model(x[target.num_mixed :])])
