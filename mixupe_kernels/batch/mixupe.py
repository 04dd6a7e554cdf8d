"""Mixup's batch with the clean rows that the regularizer is taken on, drawn by one of several policies."""

from collections.abc import Callable
from dataclasses import dataclass

from .. import checks
from .mixup import Mixup
from .names import ELSEWHERE
from .plan import CleanRows


@checks.named_arguments(ELSEWHERE)
@dataclass(eq=False, repr=False, kw_only=True)
class MixupE(Mixup):
    """The batch of MixupE (Zou et al., UAI 2023): mixup's rows, then the clean rows its regularizer is taken on.

    The model sees one batch, so BatchNorm sees both kinds of rows in it: :func:`split_batch_norm` keeps them apart. What
    each policy costs a step that is bound by throughput, against mixup, and what it estimates:

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

    Start with ``clean_fraction=1/4`` and ``MixupELoss(clean_weight=1/4)``, and with :func:`split_batch_norm` if the model has
    BatchNorm. The default is the paper's batch, for reproducing it.

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

    clean_fraction: float = 1.0
    split: bool = False
    regularize: str = "clean"
    interval: int = 1
    eta_ramp: Callable[[float], float] | None = None

    def _clean_rows(self) -> CleanRows:
        self._clean = CleanRows(self)
        return self._clean

    def num_clean(self, batch: int) -> int:
        """Clean rows for a batch of ``batch`` samples: about ρB, so that all rows are a multiple of 8 if they can be."""
        return self._clean.num_clean(checks.integer("batch", batch, 0))

    def num_rows(self, batch: int) -> int:
        return self._clean.num_rows(checks.integer("batch", batch, 0))
