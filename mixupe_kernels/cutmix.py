"""CutMix (Yun et al., 2019): a box of the partner's image in place of the own, λ being the share of the area that stays."""

import torch
from torch import Tensor

from . import ops
from .constants import constant
from .inputs import Arguments


def draw_box(lam: Tensor, height: int, width: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A box of the area 1 - λ around a uniform centre, clipped to the image: ((4,) int64 top, bottom, left, right; λ).

    The λ returned is the share of the pixels outside the clipped box, exact.
    """
    size = constant(
        ("image", height, width, lam.device), lambda: torch.tensor([height, width], dtype=torch.float64).to(lam.device)
    )
    centre = (torch.rand(2, dtype=torch.float64, device=lam.device, generator=generator) * size).floor()
    half = (0.5 * torch.sqrt(1 - lam.double()) * size).floor()
    first, last = (centre - half).clamp_(min=0), torch.minimum(centre + half, size)
    area = (last - first).prod()
    return torch.stack([first, last], 1).reshape(4).long(), (1 - area / (height * width)).float()


def paste_box(out: Tensor, x: Tensor, partner: Tensor, box: Tensor, arguments: Arguments) -> None:
    """Write the box of ``f(x[partner])`` over the first rows of ``out``, one for each partner."""
    own = constant(("one", x.device), lambda: torch.ones((), device=x.device))
    own = own.double() if x.dtype == torch.float64 else own
    target = out[: partner.shape[0]]
    scale, shift, _, _ = arguments
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        top, bottom, left, right = box.tolist()
        inside = (..., slice(top, bottom), slice(left, right))
        if bottom > top and right > left:
            target[inside] = ops.call(ops.mix_op, x[inside], partner, own, partner, scale, shift, out.dtype)
        return
    # Elsewhere reading the box back would synchronise: every pixel is read, and written where it lies inside.
    height, width = x.shape[-2:]
    down, across = torch.arange(height, device=x.device).unsqueeze(1), torch.arange(width, device=x.device)
    inside = (down >= box[0]) & (down < box[1]) & (across >= box[2]) & (across < box[3])
    other = ops.call(ops.mix_op, x, partner, own, partner, scale, shift, out.dtype)
    target.copy_(torch.where(inside, other, target))
