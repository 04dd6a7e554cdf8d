"""Random calls of the operators, each from its number: shapes of 0 and 1, strides, dtypes, infinities, every option."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixupe_kernels.conventions import PENALTIES

from .cases import DTYPES, LAYOUTS, as_double, compute_dtype, make_logits

ops = torch.ops.mixupe
ACTIVATIONS = ("softmax", "sigmoid")
END = 16  # columns, of a row's beginning and of its end
ULPS = 16  # of the result's magnitude, or of the floor's, that are allowed beside 4 times PyTorch's error


class Call(NamedTuple):
    """A chain of operators on inputs of its own.

    Attributes:
        description: the options drawn, for the message about a mismatch.
        run: (inputs) → results.
        inputs: as ``run`` takes them.
        floor: the magnitude whose float32 rounding any result may carry, if that is larger than the result's own.
        floors: the same of single results, by their places: what large terms that cancel leave of one float32 rounding.
        settled: whether the true results are far enough from a jump (of a penalty's slope, say) to be compared.
    """

    description: str
    run: Callable[..., list[Tensor]]
    inputs: tuple
    floor: float = 1.0
    floors: dict[int, float] = {}
    settled: Callable[[list[Tensor]], bool] = lambda results: True

    def compute(self, exact: bool = False) -> list[Tensor]:
        """The results by the backend in use; exactly: of the inputs in float64."""
        return self.run(*(as_double(value) if exact else value for value in self.inputs))


def make_call(number: int) -> Call:
    """The call of this number, the same on every machine of one torch version."""
    draw = random.Random(number)
    torch.manual_seed(number)
    return draw.choice(KINDS)(draw)


# Logits and targets


def draw_shape(draw) -> tuple[int, int]:
    rows = draw.choice([0, 1, 1, 2, 3, 5, 8, 17])
    return rows, draw.choice([1, 2, 3, 5, 10, 16, 31, 33, 64, 100, 129, 300, draw.randint(1, 700), 1031])


def draw_logits(draw, shape) -> tuple[Tensor, str]:
    dtype, layout = draw.choice(DTYPES), draw.choice(LAYOUTS)
    scale, shift = draw.choice([1e-3, 1, 1, 4, 4, 30, 1e4, 1e30]), draw.choice([0, 0, 0, -50, 1e3, -1e4])
    logits = make_logits(shape, torch.float64, layout, scale) + shift
    logits = logits.clamp(-6e4, 6e4) if dtype == torch.float16 else logits
    z = torch.empty_strided(shape, make_logits(shape, torch.bool, layout).stride(), dtype=dtype).copy_(logits)
    special = draw.choice([None] * 6 + [-torch.inf, -torch.inf, torch.inf, torch.nan])
    if special is not None and z.numel():
        chosen = torch.rand(shape) < draw.choice([0.02, 0.3, 1])
        z.masked_fill_(chosen, special)
    return z, f"{shape} {dtype} {layout} scale {scale} shift {shift} special {special}"


def draw_labels(draw, shape, ignore_index) -> Tensor:
    """Of a third of the calls all labels are within a vector of a row's ends, which kernels read by loops of their own."""
    rows, classes = shape
    labels = torch.randint(classes, (2 * rows,))
    if classes > 2 * END and random.Random(f"row ends {torch.initial_seed()}").random() < 1 / 3:
        labels = labels % (2 * END)
        labels += torch.where(labels < END, 0, classes - 2 * END)
    labels[torch.rand(2 * rows) < draw.choice([0, 0, 0.2, 1])] = ignore_index
    return labels[::2] if draw.random() < 0.3 else labels[:rows]


def draw_lam(draw, size, dtype) -> Tensor:
    lam = torch.rand(size, dtype=dtype)
    kind = draw.choice(["any", "ends", "zeros", "ones"])
    if kind == "ends":
        lam = torch.where(torch.rand(size) < 0.6, lam.round(), lam)
    return {"zeros": torch.zeros_like(lam), "ones": torch.ones_like(lam)}.get(kind, lam)


def draw_target(draw, shape, dtype, sigmoid, ignore_index=-100):
    """((labels, partner_labels, lam), what they are)."""
    kind = draw.choice(["index", "mixed", "mixed", "dense"])
    if kind == "index":
        return (draw_labels(draw, shape, ignore_index), None, None), kind
    if kind == "mixed":
        labels = draw_labels(draw, shape, ignore_index)
        partner_labels = labels.clone() if draw.random() < 0.2 else draw_labels(draw, shape, ignore_index)
        return (labels, partner_labels, draw_lam(draw, shape[:1], compute_dtype(dtype))), kind
    mass = draw.choice([1, 1, 1, 0, 0.5, 1.7])
    y = torch.rand(shape) if sigmoid else mass * torch.rand(shape).softmax(1)
    if draw.random() < 0.3:
        y = y.masked_fill(torch.rand(shape) < 0.5, 0)
    y = y.t().contiguous().t() if draw.random() < 0.3 else y
    return (y.to(compute_dtype(dtype)), None, None), f"dense, mass {mass}"


def magnitude(logits: Tensor) -> float:
    finite = logits[logits.isfinite()].double().abs()
    return max(1.0, float(finite.max()) if finite.numel() else 1.0)


def draw_ce_entropy(draw) -> Call:
    shape, sigmoid = draw_shape(draw), draw.random() < 0.3
    logits, described = draw_logits(draw, shape)
    compute = compute_dtype(logits.dtype)
    ignore_index = draw.choice([-100, -100, 0, shape[1] - 1])
    target, kind = draw_target(draw, shape, logits.dtype, sigmoid, ignore_index)
    weight = draw.choice([None, None, torch.rand(shape[1], dtype=compute).round(decimals=1)])
    options = (draw.choice([0.0, 0.0, 0.1, 1.0]), ignore_index, sigmoid)
    upstream = torch.randn(shape[0], 3, dtype=compute)
    wanted = [draw.random() < 0.7 for _ in range(3)]

    def run(logits, labels, partner_labels, lam, weight, upstream):
        arguments = (labels, partner_labels, lam, weight, *options)
        outputs = ops.ce_entropy(logits, *arguments)
        grads = [upstream[:, i] if wanted[i] else None for i in range(3)]
        return [*outputs, ops.ce_entropy_backward(*grads, logits, *outputs[1:], *arguments)]

    described = f"ce_entropy {described} {kind} weighted {weight is not None} {options} gradients {wanted}"
    return Call(described, run, (logits, *target, weight, upstream))


def draw_mixupe_loss(draw) -> Call:
    shape, sigmoid = draw_shape(draw), draw.random() < 0.25
    logits, described = draw_logits(draw, shape)
    compute = compute_dtype(logits.dtype)
    target, kind = draw_target(draw, shape, logits.dtype, sigmoid)
    eta, reg_weight = (torch.tensor(draw.choice([0, 1e-3, 0.3, 1, 10]), dtype=compute) for _ in range(2))
    counts = (draw.randint(0, shape[0]), draw.randint(0, shape[0]))
    penalty, threshold = draw.randrange(len(PENALTIES)), draw.choice([1.0, 0.0, -0.5])
    rescale, smoothing = draw.random() < 0.5, draw.choice([0.0, 0.0, 0.1])
    grad = torch.tensor(draw.choice([1, 1.7, -2]), dtype=compute)
    gamma = draw.choice([0.0, 0.0, 0.25, 1 / 3, 3.0])
    if counts[0] == shape[0] and counts[1]:
        gamma = 0.0  # refused: R is of mixed rows

    def run(logits, labels, partner_labels, lam, eta, reg_weight, grad):
        target, tail = (labels, partner_labels, lam), (smoothing, sigmoid)
        arguments = (logits, *target, eta, reg_weight, *counts, penalty, threshold, rescale, *tail, gamma)
        loss, parts, *rows = ops.mixupe_loss(*arguments)
        dz = ops.mixupe_loss_backward(grad, logits, *target, parts, *rows, counts[0], penalty, *tail)
        return [loss, parts, *rows, dz, *ops.mixupe_loss_with_gradient(*arguments)]

    def settled(results):
        """q̂ of the regularized rows is not at a jump of the slope, and L is not what is left of two large terms."""
        arguments = (*map(as_double, (logits, *target)), None, smoothing, -100, sigmoid)
        ce, entropy, lse = ops.ce_entropy(*arguments)
        q = entropy - ce
        if target[0].dim() == 2 and not sigmoid:
            q = q + ((target[0].double() * (1 - smoothing) + smoothing / shape[1]).sum(1) - 1) * lse
        q = q[shape[0] - counts[1] :]
        jump = {"abs": 0.0, "threshold": threshold}.get(list(PENALTIES)[penalty], torch.nan)
        near = (q - jump).abs() <= 1e-3 * (magnitude(logits) if target[0].dim() == 2 else 1)
        parts = results[1]
        mix_loss, clean_loss, reg, *_ = parts
        cross_entropy = mix_loss + gamma * clean_loss if gamma else mix_loss
        left = (cross_entropy + eta.double() * reg).abs() >= 0.05 * cross_entropy.abs()
        if cross_entropy == 0 and reg.abs() <= 1e-6 * reg_weight:  # η̂ jumps from 0 to 1 where L is 0
            return False
        return not bool(near.any()) and (bool(left) or not rescale or bool(parts.isnan().any()))

    options = f"γ {gamma} {counts} {list(PENALTIES)[penalty]} {threshold} {rescale} {smoothing} sigmoid {sigmoid}"
    described = f"mixupe_loss {described} {kind} η {eta} w {reg_weight} {options}"
    # (Σy - 1)·lse is as uncertain as the logits' own rounding.
    floor = magnitude(logits) if target[0].dim() == 2 else 1.0
    # H and BCE of a sigmoid model are sums of C terms of up to log 2 about logits of 0, and q̂ is what is left of them.
    left = max(floor, shape[1] / ULPS * max(1.0, float(eta * reg_weight))) if sigmoid else floor
    floors = dict.fromkeys((0, 1, 5, 6), left)  # the loss and its parts, from either operator
    return Call(described, run, (logits, *target, eta, reg_weight, grad), floor, floors, settled)


# Mixing


def draw_images(draw) -> tuple[Tensor, str]:
    rank = draw.choice([1, 2, 3, 4, 4, 5])
    shape = [draw.choice([0, 1, 2, 3, 5, 8]), *(draw.choice([0, 1, 2, 3, 4, 7, 9, 17]) for _ in range(rank - 1))]
    dtype = draw.choice([*DTYPES, torch.uint8])
    layout = draw.choice(["contiguous", "contiguous", "transposed", "sliced", "channels_last"])
    x = torch.randint(256, shape).to(dtype) if dtype == torch.uint8 else torch.randn(shape).to(dtype)
    if layout == "transposed" and rank > 2:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        x = torch.cat([x, x])[::2] if x.shape[0] else x
    if layout == "channels_last" and rank in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if rank == 4 else torch.channels_last_3d)
    if draw.random() < 0.1 and dtype != torch.uint8:
        x[torch.rand(x.shape) < 0.1] = draw.choice([torch.inf, -torch.inf, torch.nan])
    return x, f"{tuple(shape)} {dtype} {layout} {x.stride()}"


def draw_mix(draw) -> Call:
    x, described = draw_images(draw)
    batch, compute = x.shape[0], compute_dtype(x.dtype)
    rows = torch.randint(batch, (draw.choice([0, 1, 4, 9]),)) if batch and draw.random() < 0.4 else None
    count = batch if rows is None else rows.shape[0]
    pairing = draw.choice(["flip", "permutation", "any"])
    partner = None
    if pairing != "flip":
        partner = (
            torch.randperm(count) % max(batch, 1)
            if pairing == "permutation"
            else torch.randint(max(batch, 1), (count,))
        )
    lam = draw_lam(draw, draw.choice([(), (count,)]), compute)
    scale = shift = box = dtype = memory_format = None
    if x.dim() >= 2 and (x.dtype == torch.uint8 or draw.random() < 0.3):
        scale, shift = torch.rand(x.shape[1], dtype=compute) / 8, torch.randn(x.shape[1], dtype=compute)
    if x.dtype == torch.uint8 or draw.random() < 0.3:
        dtype = draw.choice(DTYPES if x.dtype == torch.float64 else [torch.float32, torch.bfloat16, torch.float16])
    if x.dim() >= 3 and draw.random() < 0.4:
        box = torch.tensor([draw.randint(-2, 10) for _ in range(4)])
    if x.dim() == 4 and draw.random() < 0.3:
        memory_format = draw.choice([torch.contiguous_format, torch.channels_last])
    upstream = torch.randn(count, *x.shape[1:])

    floating = x.is_floating_point()

    def run(x, lam, scale, shift, dtype, upstream):
        x, lam = x.detach().requires_grad_(floating), lam.detach().requires_grad_()
        out = ops.mix(x, partner, lam, rows, scale, shift, dtype, memory_format, box)
        return [out.detach(), *torch.autograd.grad(out, (x, lam) if floating else (lam,), upstream.to(out.dtype))]

    options = f"{pairing} rows {None if rows is None else count} λ {tuple(lam.shape)} scaled {scale is not None}"
    box_text = None if box is None else box.tolist()
    described = f"mix {described} {options} dtype {dtype} format {memory_format} box {box_text}"
    # dλ of pixels is a sum of terms of either sign up to 255 times the scale, 32.
    pixels = {} if floating else {1: 32 / ULPS * max(1.0, upstream.numel() ** 0.5)}
    return Call(described, run, (x, lam, scale, shift, dtype, upstream), floors=pixels)


def draw_sums(draw) -> Call:
    x, described = draw_images(draw)
    if not x.is_floating_point():
        x = x.float()
    if not x.shape[0]:
        x = torch.randn(3, *x.shape[1:]).to(x.dtype)
    rows, terms, outputs = x.shape[0], draw.choice([0, 1, 5, 20]), draw.choice([0, 1, 4])
    index, other = torch.randint(rows, (2, terms))
    weight = torch.randn(terms, dtype=compute_dtype(x.dtype))
    offsets = torch.randint(terms + 1, (outputs + 1,)).sort().values
    offsets[0] = 0
    if outputs:
        offsets[-1] = terms
    else:
        index, other, weight = index[:0], other[:0], weight[:0]

    def run(x, weight):
        return [ops.gather_sum(x, index, weight, offsets), ops.row_dot(x, x.flip(0), index, other)]

    return Call(f"sums {described} terms {terms} outputs {outputs}", run, (x, weight))


KINDS: list[Callable[[Any], Call]] = [
    draw_ce_entropy,
    draw_ce_entropy,
    draw_mixupe_loss,
    draw_mixupe_loss,
    draw_mix,
    draw_sums,
]
