"""Every contender's result against the float64 reference, a chunk of rows at a time: the (4096, 128256) case has
8.4 GB of logits in float64, and the reference holds several such tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mixupe_kernels.ops import Mixing, RowGradients, RowOptions, RowStats, RowTarget, reference

CHUNK = 1 << 24  # values at a time

# Largest deviation allowed, relative to the largest value: float32 sums of 10^5 terms, else a few roundings of the
# dtype, since eager PyTorch rounds after every operation (eps of bfloat16 is 2^-7, of float16 2^-10).
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Deviation:
    """max |got - want| / max |want| over all chunks added; NaN if any value is."""

    def __init__(self):
        self.difference = torch.zeros((), dtype=torch.float64)
        self.size = torch.zeros((), dtype=torch.float64)

    def add(self, got: Tensor, want: Tensor) -> None:
        if got.shape != want.shape:
            raise ValueError(f"result has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if want.numel():
            self.difference = torch.maximum(self.difference, (got.double() - want).abs().amax().cpu())
            self.size = torch.maximum(self.size, want.abs().amax().cpu())

    @property
    def value(self) -> float:
        return float(self.difference / self.size.clamp(min=torch.finfo(torch.float64).tiny))


def chunks(rows: int, length: int) -> Iterator[slice]:
    """Slices of whole rows of at most CHUNK values together."""
    step = max(CHUNK // max(length, 1), 1)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def mix_error(
    out: Tensor, x: Tensor, partner: Tensor, lam: Tensor, rows: Tensor, scale: Tensor | None, shift: Tensor | None
) -> float:
    """Deviation of ``out`` from x[rows] mixed with x[partner]."""
    deviation = Deviation()
    if out.shape[0] != rows.shape[0]:
        raise ValueError(f"result has {out.shape[0]} rows, expected {rows.shape[0]}")
    lam = lam.double().expand(rows.shape[0])
    channel = [None if values is None else values.double() for values in (scale, shift)]
    for part in chunks(rows.shape[0], x[0].numel()):
        pair = torch.cat([x[rows[part]], x[partner[part]]]).double()
        count = pair.shape[0] // 2
        first = torch.arange(count, device=x.device)
        deviation.add(out[part], reference.mix(pair, Mixing(first + count, lam[part], first, *channel)))
    return deviation.value


def fitted_lam(out: Tensor, x: Tensor, partner: Tensor) -> Tensor:
    """The λ that explains ``out`` best, by least squares: for libraries that draw their own."""
    difference = x.double() - x[partner].double()
    return ((out.double() - x[partner].double()) * difference).sum() / difference.square().sum()


def row_target(target: tuple[Tensor, ...], part: slice) -> RowTarget:
    """Those rows of (labels, partner_labels, lam), in float64."""
    return RowTarget(*(values[part].double() if values.is_floating_point() else values[part] for values in target))


def ce_entropy(logits: Tensor, target: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's (CE, H, lse) in float64."""
    parts = [
        reference.ce_entropy(logits[part].double(), row_target(target, part), RowOptions())
        for part in chunks(*logits.shape)
    ]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def gradient_error(
    gradient: Tensor,
    coefficients: tuple[Tensor | None, ...],
    logits: Tensor,
    entropy: Tensor,
    lse: Tensor,
    target: tuple[Tensor, ...],
) -> float:
    """Deviation of a gradient with respect to the logits from the reference's, for upstream (g_ce, g_H, g_lse)."""
    deviation = Deviation()
    for part in chunks(*logits.shape):
        upstream = RowGradients(*(None if values is None else values[part].double() for values in coefficients))
        stats, rows = RowStats(entropy[part], lse[part]), row_target(target, part)
        want = reference.ce_entropy_backward(upstream, logits[part].double(), stats, rows, RowOptions())
        deviation.add(gradient[part], want)
    return deviation.value


def mixupe_loss_errors(
    loss: Tensor,
    gradient: Tensor,
    logits: Tensor,
    target: tuple[Tensor, ...],
    eta: Tensor,
    reg_weight: Tensor,
    num_mixed: int,
) -> tuple[float, float]:
    """Deviations of the loss (penalty "abs", all other rows clean) and of its gradient."""
    ce, entropy, lse = ce_entropy(logits, target)
    num_reg = ce.shape[0] - num_mixed
    mix_loss = ce[:num_mixed].mean()
    reg = reg_weight.double() * (entropy - ce)[num_mixed:].abs().mean()
    total = mix_loss + eta.double() * reg
    eta_hat = mix_loss.abs() / total.abs()
    value = Deviation()
    value.add(loss, eta_hat * total)
    grad_q = eta_hat * eta.double() * reg_weight.double() / num_reg * torch.sign(entropy - ce)
    grad_q[:num_mixed] = 0
    grad_ce = -grad_q
    grad_ce[:num_mixed] += eta_hat / num_mixed
    coefficients = (grad_ce, grad_q, torch.zeros_like(grad_q))
    return value.value, gradient_error(gradient, coefficients, logits, entropy, lse, target)
