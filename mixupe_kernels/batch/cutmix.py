"""CutMix (Yun et al., 2019): a box of the partner's image in place of the own, λ being the share of the area that stays."""

import torch
from torch import Tensor

from ..conventions import constant, vector, wide_dtype
from .randomness import Source
from .sampling import rand


def draw_box(lam: Tensor, height: int, width: int, generator: Source) -> tuple[Tensor, Tensor]:
    """A box of the area 1 - λ around a uniform centre, clipped to the image: ((4,) int64 top, bottom, left, right; λ).

    The λ returned is the share of the pixels outside the clipped box, exact.
    """
    size = constant(
        ("image", height, width, lam.device),
        lambda: vector([height, width], wide_dtype(lam.device), lam.device),
    )
    centre = (rand((2,), generator, lam.device, wide_dtype(lam.device)) * size).floor()
    half = (0.5 * torch.sqrt(1 - lam.to(size.dtype)) * size).floor()
    first, last = (centre - half).clamp_(min=0), torch.minimum(centre + half, size)
    area = (last - first).prod()
    return torch.stack([first, last], 1).reshape(4).long(), (1 - area / max(height * width, 1)).float()
