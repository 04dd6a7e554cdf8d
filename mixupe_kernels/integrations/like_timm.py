"""timm's arguments; needs no timm."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks
from ..batch.cutmix import Boxes
from ..batch.mixup import Mixup
from ..batch.mixupe import MixupE
from ..loss.criterion import MixupELoss

MODES: dict[str, bool | str] = {"batch": False, "elem": True, "pair": "pair"}  # and per_sample


def like_timm(
    mixup_alpha: float = 1.0,
    cutmix_alpha: float = 0.0,
    cutmix_minmax: Sequence[float] | None = None,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: str = "batch",
    correct_lam: bool = True,
    label_smoothing: float = 0.1,
    num_classes: int = 1000,
    *,
    clean_fraction: float | None = None,
    eta: float | None = None,
    clean_weight: float | None = None,
    split: bool = False,
    off_epoch: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Mixup, MixupELoss]:
    """``timm.data.Mixup`` and ``SoftTargetCrossEntropy`` of the same arguments, as a mixer and a criterion.

    Each sample meets the one at its place from the batch's end, as in timm. With ``clean_fraction`` clean rows follow the
    mixed ones, and the loss has terms for them; without, it is the mean cross-entropy with the mixed targets.

    Args:
        mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob: as timm's; an alpha of 0 leaves its kind of mixing out.
        mode: ``"batch"``, ``"elem"`` (one λ, or box, for each sample) or ``"pair"`` (for each sample and its partner).
        correct_lam: λ of a box that is clipped is the share that stayed.
        label_smoothing: towards 1/C; the criterion's, and so of validation by it, too.
        num_classes: of ``target.dense(num_classes)``, which timm's losses take; the criterion needs only the indices.
        clean_fraction, split, off_epoch, generator: as :class:`MixupE`.
        eta, clean_weight: as :class:`MixupELoss`; with ``clean_fraction`` 1e-3 and the weight with which every row counts
            once, if None.

    Returns:
        ``(mixup_fn, criterion)``. ``mixup_fn.mixup_enabled`` may be set as timm's script does.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value, or if both alphas are 0.

    timm's boxes have sides of any number of pixels, these of even ones, if they are not clipped: the law of λ is the same to
    a pixel's share.
    """
    mixup_alpha = checks.non_negative("mixup_alpha", mixup_alpha)
    cutmix_alpha = checks.non_negative("cutmix_alpha", cutmix_alpha)
    if cutmix_minmax is not None:
        cutmix_alpha = 1.0  # as in timm, whose boxes then have sides of these shares
    switch_prob = checks.fraction("switch_prob", switch_prob)
    checks.positive_int("num_classes", num_classes)
    if not mixup_alpha and not cutmix_alpha:
        raise ValueError("mixup_alpha must be > 0 where cutmix_alpha is 0 and cutmix_minmax None, got 0")
    options: dict[str, Any] = {
        "alpha": mixup_alpha or cutmix_alpha,
        "pairing": "flip",
        "per_sample": MODES[checks.choice("mode", mode, MODES)],
        "prob": prob,
        "off_epoch": off_epoch,
        "generator": generator,
    }
    if cutmix_alpha:
        options["cutmix_alpha"] = Boxes(cutmix_alpha, cutmix_minmax, correct_lam)
        options["switch_prob"] = switch_prob if mixup_alpha else 1.0
    if clean_fraction is None:
        for name, value in (("eta", eta), ("clean_weight", clean_weight), ("split", split or None)):
            if value is not None:
                raise ValueError(f"clean_fraction must be given with {name}, got None: there are no clean rows")
        return Mixup(**options), MixupELoss(eta=0.0, label_smoothing=label_smoothing)
    mixup_fn = MixupE(clean_fraction=clean_fraction, split=split, **options)
    once = clean_fraction / (1 - clean_fraction) if split else clean_fraction
    return mixup_fn, MixupELoss(
        eta=1e-3 if eta is None else eta,
        clean_weight=once if clean_weight is None else clean_weight,
        label_smoothing=label_smoothing,
    )
