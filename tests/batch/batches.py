"""Samples of tests of the mixers, and what a draw makes of them by the definition."""

import torch

CLASSES = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def samples(batch=24, *shape, dtype=torch.float32):
    return torch.randn(batch, *(shape or (6,)), dtype=dtype), torch.randint(CLASSES, (batch,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(draw, x):
    """The rows of a draw, in float64 from the definition."""
    rows = torch.arange(len(x)) if draw.rows is None else draw.rows
    partner = torch.arange(len(x)).flip(0) if draw.partner is None else draw.partner
    lam = draw.lam.double().expand(len(rows)).reshape(-1, *[1] * (x.dim() - 1))
    return lam * x.double()[rows] + (1 - lam) * x.double()[partner]


def drawn(fn, labels, x, **options):
    """The draw that ``fn`` makes of ``generator``'s state, which is left as it was."""
    state, steps = fn.generator.get_state(), fn.steps
    draw = fn.draw(labels, **options)
    fn.generator.set_state(state)
    fn.steps = steps
    return draw


def images(dtype, layout="contiguous", batch=8, size=(3, 6, 5)):
    wide = (batch, size[0], size[1], size[2] + 2) if layout == "sliced" else (batch, *size)
    x = torch.randint(0, 256, wide, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(wide, dtype=dtype)
    if layout == "sliced":
        return x[..., 1 : size[2] + 1]
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def normalised(x, mean=MEAN, std=STD):
    """torchvision's to_dtype(scale=True) and Normalize, in float64."""
    if mean is None:
        return x.double()
    values = x.double() / 255 if x.dtype == torch.uint8 else x.double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, *[1] * (x.dim() - 2)) for v in (mean, std))
    return (values - mean) / std


def call_and_draw(fn, x, labels, **arguments):
    state = fn.generator.get_state()
    draw = fn.draw(labels)
    fn.generator.set_state(state)
    fn.steps -= 1
    return fn(x, labels, **arguments), draw


def tolerance(dtype):
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
