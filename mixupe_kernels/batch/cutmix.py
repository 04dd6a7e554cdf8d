"""CutMix (Yun et al., 2019): a box of the partner's image in place of the own, λ being the share of the area that stays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..conventions import constant, vector, wide_dtype
from ..ops.reference import inside_box
from .randomness import Source
from .sampling import Beta, rand


class Boxes:
    """What boxes are drawn, one a batch or one a sample.

    Args:
        alpha: their area is 1 - λ before it is clipped to the image, λ ~ Beta(alpha, alpha).
        minmax: instead, each side is uniform between these shares of the image's, and the whole box lies within it.
        correct_lam: the labels' λ is the share of pixels that stayed; False leaves it as it was drawn, with alpha.
    """

    def __init__(self, alpha: float, minmax: Sequence[float] | None = None, correct_lam: bool = True):
        self.law = Beta(checks.positive("cutmix_alpha", alpha))
        self.minmax = None if minmax is None else _shares(minmax)
        self.correct_lam = checks.boolean("correct_lam", correct_lam)

    def __repr__(self) -> str:
        return f"Boxes({self.law!r}, {self.minmax}, {self.correct_lam})"

    def draw(
        self, lam: Tensor, image_size: tuple[int, int], source: Source, switch_prob: float, prob: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes for some of what is to be mixed by ``lam``: (λ of the labels, λ of the pixels outside, boxes).

        Boxes are (*lam.shape, 4) int64: top, bottom, left and right; empty for what stays mixed by its λ.
        """
        device = lam.device
        uniform = rand((2, *lam.shape), source, device)
        cut, used = uniform[0] < switch_prob, uniform[1] < prob
        drawn = self.law.sample(lam.shape, source, device)
        if self.minmax is None:
            box, box_lam = draw_box(drawn, *image_size, source)
        else:
            box, box_lam = draw_box_of_sides(self.minmax, lam.shape, *image_size, source, device)
        if not self.correct_lam and self.minmax is None:
            box_lam = drawn
        one = torch.ones_like(lam)
        box_lam = torch.where(used, box_lam, one)
        return torch.where(cut, box_lam, lam), torch.where(cut, one, lam), box * (cut & used).unsqueeze(-1)


def _shares(minmax: Sequence[float]) -> tuple[float, float]:
    if isinstance(minmax, str) or not isinstance(minmax, Sequence) or len(minmax) != 2:
        raise TypeError(f"cutmix_minmax must be two numbers or None, got {minmax!r}")
    low, high = (checks.fraction(f"cutmix_minmax[{i}]", value) for i, value in enumerate(minmax))
    if low > high:
        raise ValueError(f"cutmix_minmax must be (smallest, largest), got {(low, high)}")
    return low, high


def _share_outside(first: Tensor, last: Tensor, height: int, width: int) -> Tensor:
    return (1 - (last - first).prod(-1) / max(height * width, 1)).float()


def _as_box(first: Tensor, last: Tensor) -> Tensor:
    return torch.stack([first, last], -1).flatten(-2).long()


def draw_box(lam: Tensor, height: int, width: int, generator: Source) -> tuple[Tensor, Tensor]:
    """Boxes of the area 1 - λ around a uniform centre, clipped to the image: ((*, 4) int64 top, bottom, left, right; λ).

    The λ returned is the share of the pixels outside the clipped box, exact.
    """
    dtype = wide_dtype(lam.device)
    size = constant(("image", height, width, lam.device), lambda: vector([height, width], dtype, lam.device))
    centre = (rand((*lam.shape, 2), generator, lam.device, dtype) * size).floor()
    half = (0.5 * torch.sqrt(1 - lam.to(dtype)).unsqueeze(-1) * size).floor()
    first, last = (centre - half).clamp_(min=0), torch.minimum(centre + half, size)
    return _as_box(first, last), _share_outside(first, last, height, width)


def draw_box_of_sides(
    minmax: tuple[float, float], shape: Sequence[int], height: int, width: int, generator: Source, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Boxes whose sides are whole numbers of pixels, at least the first share of the image's and less than the second."""
    dtype, low, high = wide_dtype(device), [], []
    for side in (height, width):
        low.append(int(side * minmax[0]))
        high.append(max(int(side * minmax[1]), low[-1] + 1))
    size, least, most = (vector(values, dtype, device) for values in ([height, width], low, high))
    uniform = rand((2, *shape, 2), generator, device, dtype)
    sides = least + (uniform[0] * (most - least)).floor()
    first = (uniform[1] * (size - sides + 1)).floor()
    return _as_box(first, first + sides), _share_outside(first, first + sides, height, width)


def of_rows(box: Tensor, rows: Tensor, num_mixed: int) -> Tensor:
    """Of a box for each sample that of each of ``rows``, (N, 4), of which those after ``num_mixed`` have none."""
    if box.dim() == 1:
        return box
    return torch.cat([box.index_select(0, rows[:num_mixed]), box.new_zeros((rows.shape[0] - num_mixed, 4))])


def inside(box: Tensor, x: Tensor) -> Tensor:
    """The pixels of x (N, ..., H, W) that lie within the box, (H, W) bool, or within each row's own, (N, 1, ..., H, W)."""
    if box.dim() == 1:
        return inside_box(box, x)
    ends = box.reshape(box.shape[0], 4, *[1] * (x.dim() - 1)).unbind(1)
    down, across = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    down = down.unsqueeze(1)
    return (down >= ends[0]) & (down < ends[1]) & (across >= ends[2]) & (across < ends[3])
