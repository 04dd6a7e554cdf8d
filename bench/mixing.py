"""What the cases of mixing run: see ``workloads``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import mixupe_kernels as mk

from . import check, eager, peers
from .cases import COMPILE, COPY, EAGER, Case
from .workload import Workload, within

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's models use them


class MixInputs(NamedTuple):
    """``weight`` is λ as the Python number that eager code has, ``lam`` the same on the device."""

    x: Tensor
    partner: Tensor
    lam: Tensor
    weight: float
    rows: Tensor
    row_lam: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    source: Tensor | None = None
    out: Tensor | None = None


def _mix_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> MixInputs:
    batch = shape[0]
    if dtype == torch.uint8:
        x = torch.randint(0, 256, shape, dtype=dtype, device=device)
    else:
        x = torch.randn(shape, dtype=dtype, device=device)
    lam = torch.tensor(0.3, device=device)
    return MixInputs(
        x, torch.randperm(batch, device=device), lam, 0.3, torch.arange(batch, device=device), lam.expand(batch)
    )


def _mix_check(pairing: dict[str, Tensor], dtype: torch.dtype) -> Callable:
    """``pairing`` holds the partners of libraries that choose their own, and draw their own λ."""

    def run(provider: str, inputs: MixInputs, results: tuple[Tensor, ...]) -> float:
        (out,) = results
        if provider == COPY:
            if not torch.equal(inputs.source, out):
                raise ValueError("the copy differs from its source")
            return 0.0
        partner, lam = inputs.partner, inputs.row_lam
        if provider in pairing:
            partner = pairing[provider]
            lam = check.fitted_lam(out, inputs.x, partner).clamp(0, 1)
        error = check.mix_error(out, inputs.x, partner, lam, inputs.rows, inputs.scale, inputs.shift)
        return within(error, dtype, provider)

    return run


def _copy(inputs: MixInputs) -> tuple[Tensor]:
    return (inputs.out.copy_(inputs.source),)


def mix(case: Case, shape, device, backends, compiler) -> Workload:
    """A fresh output, random partners."""
    dtype = getattr(torch, case.dtype)
    inputs = _mix_inputs(shape, dtype, device)
    inputs = inputs._replace(source=inputs.x, out=torch.empty_like(inputs.x))
    compiled = compiler(eager.mix)
    calls = dict.fromkeys(backends, lambda i: (mk.mix(i.x, i.partner, i.lam),))
    calls |= {
        EAGER: lambda i: (eager.mix(i.x, i.partner, i.weight),),
        COMPILE: lambda i: (compiled(i.x, i.partner, i.lam),),
        COPY: _copy,
    }
    pairing = {}
    if inputs.x.dim() == 4:
        for name, (call, partner) in peers.mixers(shape[0], device).items():
            calls[name] = lambda i, call=call: (call(i.x),)
            pairing[name] = partner
    return Workload(inputs, calls, _mix_check(pairing, dtype), 2 * inputs.x.nbytes)


def mix_flip(case: Case, shape, device, backends, compiler) -> Workload:
    """A fresh output, partner i the row B - 1 - i."""
    workload = mix(case, shape, device, backends, compiler)
    partner = workload.inputs.rows.flip(0)
    calls = workload.calls | dict.fromkeys(backends, lambda i: (mk.mix(i.x, "flip", i.lam),))
    return workload._replace(inputs=workload.inputs._replace(partner=partner), calls=calls)


def mix_out(case: Case, shape, device, backends, compiler) -> Workload:
    """A caller's buffer, as a data loader's ring of batches is: no page faults, no allocation."""
    workload = mix(case, shape, device, backends, compiler)
    calls = dict.fromkeys(backends, lambda i: (mk.mix(i.x, i.partner, i.lam, out=i.out),)) | {COPY: _copy}
    return workload._replace(calls=calls)


def mixed_and_clean_out(case: Case, shape, device, backends, compiler) -> Workload:
    """The batch of MixupE's full policy: B mixed rows, B clean rows, in a caller's buffer of 2B rows."""
    dtype = getattr(torch, case.dtype)
    inputs = _mix_inputs(shape, dtype, device)
    rows, batch = inputs.rows.repeat(2), shape[0]
    both = inputs._replace(
        rows=rows,
        partner=torch.cat([inputs.partner, inputs.rows]),
        row_lam=torch.cat([inputs.row_lam, torch.ones(batch, device=device)]),
        source=inputs.x.repeat(2, *[1] * (inputs.x.dim() - 1)),
        out=torch.empty((2 * batch, *shape[1:]), dtype=dtype, device=device),
    )

    def ours(i: MixInputs) -> tuple[Tensor]:
        torch.ops.mixupe.mix_out(i.x, i.partner, i.row_lam, i.rows, out=i.out)
        return (i.out,)

    calls = dict.fromkeys(backends, ours) | {
        EAGER: lambda i: (eager.mix_and_append_clean(i.x, i.partner[:batch], i.weight),),
        COPY: _copy,
    }
    return Workload(both, calls, _mix_check({}, dtype), inputs.x.nbytes + both.out.nbytes)


def normalise_mix(case: Case, shape, device, backends, compiler) -> Workload:
    """From the loader's uint8 images to the model's batch, a fresh output."""
    dtype = getattr(torch, case.dtype)
    inputs = _mix_inputs(shape, torch.uint8, device)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    inputs = inputs._replace(scale=1 / (255 * std), shift=-mean / std, mean=mean, std=std)
    compiled = compiler(eager.normalise_and_mix)

    def ours(i: MixInputs) -> tuple[Tensor]:
        return (torch.ops.mixupe.mix(i.x, i.partner, i.lam, None, i.scale, i.shift, dtype),)

    calls = dict.fromkeys(backends, ours) | {
        EAGER: lambda i: (eager.normalise_and_mix(i.x, i.partner, i.weight, i.mean, i.std, dtype),),
        COMPILE: lambda i: (compiled(i.x, i.partner, i.lam, i.mean, i.std, dtype),),
    }
    return Workload(inputs, calls, _mix_check({}, dtype), inputs.x.numel() * (1 + dtype.itemsize))
