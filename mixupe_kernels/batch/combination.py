"""Arguments of a mixer, and labels, that exclude each other: refused before anything is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import checks
from . import pairing as pairings
from .schedule import LinearRamp

if TYPE_CHECKING:
    from .plan import Plan


def check(plan: Plan) -> None:
    """Refuse arguments of a mixer that exclude each other."""
    ramp = isinstance(plan.alpha, LinearRamp)
    alphas = (plan.alpha.start, plan.alpha.stop) if isinstance(plan.alpha, LinearRamp) else (plan.alpha,)
    if min(checks.non_negative("alpha", alpha) for alpha in alphas) == 0 and plan.beta is not None:
        raise ValueError(f"beta must be None where alpha is 0, no mixing, got {plan.beta!r}")
    if plan.num_samples == 1:
        raise ValueError("num_samples must be an int >= 2, got 1")
    if plan.across and (plan.num_samples > 2 or plan.seeds is None):
        what = "num_samples must be 2" if plan.num_samples > 2 else "seed must be given"
        raise ValueError(f"{what} with pairing='across_ranks', got {plan.num_samples if plan.seeds else None}")
    if plan.num_samples > 2:
        of_two = {"cutmix_alpha": plan.cutmix, "lam_distribution": plan.given_law, "beta": plan.beta}
        for name, value in of_two.items():
            if value is not None:
                raise ValueError(f"{name} must be None with num_samples > 2, got {value!r}")
    if ramp and plan.given_law is not None:
        raise ValueError(f"alpha must be a number where lam_distribution is given, got {plan.alpha!r}")
    if plan.by_pair and (plan.given_pairing is not pairings.flip or plan.num_samples > 2):
        raise ValueError("per_sample must be True or False unless pairing is 'flip', without num_samples, got 'pair'")


def check_labels(plan: Plan, labels: Tensor, image_size: tuple[int, int] | None) -> None:
    """Refuse labels of a shape that what is to be drawn has no meaning for, before anything is drawn."""
    if plan.cutmix is not None and image_size is None:
        raise ValueError("image_size must be given with cutmix_alpha, got None")
    if plan.by_class:
        pairings.classes(labels, labels.shape[0])
    if labels.dim() == 1 or labels.is_floating_point():
        return
    shape = tuple(labels.shape)
    if plan.num_samples > 2:
        raise ValueError(f"labels must be (B,) classes or (B, C) soft with num_samples > 2, got int64 of {shape}")
    if image_size is not None and (labels.dim() < 3 or shape[-2:] != tuple(image_size)):
        raise ValueError(
            f"labels must be (B,), (B, C) soft, or maps (B, ..., {image_size[0]}, {image_size[1]}) of the images' "
            f"size with cutmix_alpha, got int64 of {shape}"
        )
