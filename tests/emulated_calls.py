"""Calls that run every CUDA kernel at least once: rows for a warp, a block and several blocks, samples of one tile and of several.

As a program it makes them on the emulated device: `python -m tests.emulated_calls`.
"""

import torch
from torch import Tensor

import mixupe_kernels as mk

from .cases import compute_dtype, make_logits, make_target
from .ops.test_sums import many_to_one

ops = torch.ops.mixupe


def loss_calls(shape, dtype, kind, shift=0.0, plain=False):
    """The losses and ce_entropy with their backwards. Far from 0 a row's lse has lost digits, and its sums are made again.

    ``plain``: aligned logits, and no target but the labels, whose columns are then written after all others.
    """
    sigmoid = kind == "sigmoid"
    target = make_target("dense" if sigmoid else kind, shape, dtype)
    logits = make_logits(shape, dtype, "contiguous" if plain else "sliced") + shift
    one, weight = (torch.tensor(value, dtype=compute_dtype(dtype)) for value in (1.0, 0.3))
    smoothing = 0.0 if plain else 0.1
    rows, tail = shape[0], (smoothing, sigmoid)
    fused = (logits, *target, one, weight, rows // 2, rows - rows // 2, 0, 1.0, True, *tail)
    loss, parts, *saved = ops.mixupe_loss(*fused)
    yield from (loss, parts, *saved, *ops.mixupe_loss_with_gradient(*fused))
    yield ops.mixupe_loss_backward(one, logits, *target, parts, *saved, rows // 2, 0, *tail)
    in_place = logits.clone()
    ops.mixupe_loss_backward_out(one, in_place, *target, parts, *saved, rows // 2, 0, *tail, out=in_place)
    yield in_place
    options = (None if plain else torch.rand(shape[1], dtype=one.dtype), smoothing, -100, sigmoid)
    ce, entropy, lse = ops.ce_entropy(logits, *target, *options)
    yield from (ce, entropy, lse)
    yield ops.ce_entropy_backward(ce, entropy, None, logits, entropy, lse, *target, *options)


def mix_calls(x, partner, *, pixels=False):
    lam = torch.rand(len(x))
    scale, shift = (torch.rand(x.shape[1]), torch.rand(x.shape[1])) if pixels else (None, None)
    out_dtype = torch.bfloat16 if pixels else None
    for box in (None, torch.tensor([1, 3, 0, 2])):
        yield ops.mix(x, partner, lam, None, scale, shift, out_dtype, None, box)


def channels_last(*shape):
    return torch.randint(256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


def sum_calls(size, dtype):
    a, b = torch.randn(7, size).to(dtype), torch.randn(4, size).to(dtype)
    index, weight, offsets = many_to_one(7, 20)
    yield ops.gather_sum(a, index, weight.to(compute_dtype(dtype)), offsets)
    yield ops.row_dot(a, b, index, torch.randint(4, (20,)))
    yield from ops.mixed_target(torch.randint(9, (7,)), None, torch.rand(7), index, 12)


CALLS = {
    "loss, a warp a row": lambda: loss_calls((5, 37), torch.float32, "mixed"),
    "loss, a block a row": lambda: loss_calls((3, 1500), torch.bfloat16, "mixed"),
    "loss, labels alone, a warp a row": lambda: loss_calls((5, 40), torch.float32, "mixed", plain=True),
    "loss, labels alone, a block a row": lambda: loss_calls((3, 1504), torch.bfloat16, "mixed", plain=True),
    "loss, dense": lambda: loss_calls((3, 1500), torch.float64, "dense"),
    "loss, far from 0": lambda: loss_calls((3, 1500), torch.float32, "index", shift=300.0),
    "loss, rows in parts": lambda: loss_calls((2, 9001), torch.float32, "mixed", shift=300.0),
    "loss, rows in parts, labels alone": lambda: loss_calls((2, 16400), torch.bfloat16, "mixed", plain=True),
    "loss, rows in parts, dense": lambda: loss_calls((2, 9001), torch.float64, "dense"),
    "loss, rows in parts, sigmoid": lambda: loss_calls((2, 9001), torch.float16, "sigmoid"),
    "loss, sigmoid": lambda: loss_calls((3, 1500), torch.float16, "sigmoid"),
    "mix": lambda: mix_calls(torch.randn(3, 7, 50, 60), torch.randint(3, (3,))),
    "mix, flip": lambda: mix_calls(torch.randn(3, 7, 50, 60).bfloat16(), None),
    "mix, pixels": lambda: mix_calls(torch.randint(256, (3, 3, 9, 7), dtype=torch.uint8), torch.arange(3), pixels=True),
    "mix, pixels, channels last": lambda: mix_calls(channels_last(3, 3, 64, 64), torch.arange(3), pixels=True),
    "mix, pixels, channels last, flip": lambda: mix_calls(channels_last(3, 3, 64, 64), None, pixels=True),
    "sums, a warp a row": lambda: sum_calls(105, torch.float32),
    "sums, a block a row": lambda: sum_calls(20011, torch.bfloat16),
}


def results(name: str) -> list[Tensor]:
    """What the calls of this name return, for the same values each time."""
    torch.manual_seed(0)
    return list(CALLS[name]())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with mk.use_backend("cuda_emulated"):
        for name in CALLS:
            found = [bool(part.isnan().any()) for part in results(name)]
            print(f"{name}: nan in {sum(found)} of {len(found)}" if any(found) else name, flush=True)
