"""What a case runs: its data, a call for each contender, and the check of each result against the reference."""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mixupe_kernels as mk

from . import check, eager, peers
from .cases import COMPILE, COPY, EAGER, FLOAT32, Case

ETA = 1e-3  # the paper's usual η (MixupE, §4.1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's models use them


class Workload(NamedTuple):
    """A case made concrete.

    Attributes:
        inputs: a NamedTuple of tensors and numbers, the argument of every call.
        calls: contender -> function of inputs to a tuple of result tensors.
        check: (contender, inputs, results) -> largest deviation from the reference; raises where it is too large.
        bytes_moved: the floor, what an ideal kernel would read and write.
    """

    inputs: tuple
    calls: dict[str, Callable[[tuple], tuple[Tensor, ...]]]
    check: Callable[[str, tuple, tuple[Tensor, ...]], float]
    bytes_moved: int

    @property
    def needs_grad(self) -> bool:
        return any(isinstance(value, Tensor) and value.requires_grad for value in self.inputs)


def backend_context(provider: str) -> AbstractContextManager:
    """What a contender has to run in: backends of ours are switched on, the others need nothing."""
    return mk.use_backend(provider) if provider in mk.available_backends() else contextlib.nullcontext()


def build(case: Case, device: str, backends: list[str], compiler: Callable, dry: bool = False) -> Workload:
    """The workload of ``case`` for ``backends``; ``compiler`` stands for :func:`torch.compile`."""
    torch.manual_seed(0)
    shape = case.dry_shape if dry else case.shape
    return WORKLOADS[case.family](case, shape, device, backends, compiler)


def copies(inputs: tuple, count: int) -> list[tuple]:
    """``inputs`` and ``count`` - 1 copies of them, in memory of their own."""

    def copy(value):
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return [inputs, *(type(inputs)(*map(copy, inputs)) for _ in range(count - 1))]


def size_of(values: tuple) -> int:
    """Bytes of the tensors among ``values``."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _within(error: float, dtype: torch.dtype, what: str) -> float:
    if not error <= check.TOLERANCE[dtype]:
        raise ValueError(
            f"{what} deviates from the float64 reference by {error:.2g}, allowed {check.TOLERANCE[dtype]:g}"
        )
    return error


# mixing ------------------------------------------------------------------------------------------------------------


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
        return _within(error, dtype, provider)

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


# losses ------------------------------------------------------------------------------------------------------------


class LossInputs(NamedTuple):
    """``one`` is the upstream gradient of the loss, made once: autograd would launch a fill for it at every call."""

    logits: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    batch_lam: Tensor
    weight: float
    eta: Tensor
    reg_weight: Tensor
    one: Tensor
    num_mixed: int
    wide: Tensor | None = None
    soft: Tensor | None = None
    grad_ce: Tensor | None = None
    grad_entropy: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    @property
    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.labels, self.partner_labels, self.lam

    @property
    def mixed_target(self) -> mk.MixedTarget:
        num_reg = self.logits.shape[0] - self.num_mixed
        return mk.MixedTarget(*self.target, self.num_mixed, num_reg, self.reg_weight)


def _loss_inputs(rows: int, classes: int, num_mixed: int, dtype: str, device: str) -> LossInputs:
    logits = 3 * torch.randn(rows, classes, dtype=getattr(torch, dtype), device=device)
    labels, partner_labels = torch.randint(0, classes, (2, rows), device=device)
    partner_labels[num_mixed:] = labels[num_mixed:]
    lam = torch.ones(rows, device=device)
    lam[:num_mixed] = 0.3
    scalars = torch.tensor([0.3, ETA, mk.expected_a_lambda(1.0), 1.0], device=device).unbind()
    batch_lam, eta, reg_weight, one = (value.clone() for value in scalars)
    return LossInputs(
        logits.requires_grad_(), labels, partner_labels, lam, batch_lam, 0.3, eta, reg_weight, one, num_mixed
    )


def _with_gradient(loss: Tensor, logits: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    # Detached: results are kept, and a kept autograd graph would tie the logits to the stream it was captured on.
    return loss.detach(), torch.autograd.grad(loss, logits, one)[0]


def mixupe_loss(case: Case, shape, device, backends, compiler) -> Workload:
    """Forward and backward of the whole loss, 2B rows: B mixed, B clean."""
    batch, classes = shape
    inputs = _loss_inputs(2 * batch, classes, batch, case.dtype, device)
    compiled = compiler(eager.mixupe_loss)

    def ours(i: LossInputs) -> tuple[Tensor, Tensor]:
        return _with_gradient(mk.mixupe_loss(i.logits, i.mixed_target, eta=i.eta), i.logits, i.one)

    def theirs(loss: Callable, i: LossInputs, lam: Tensor | float) -> tuple[Tensor, Tensor]:
        value = loss(i.logits, i.labels, i.partner_labels, lam, i.eta, i.reg_weight, i.num_mixed)
        return _with_gradient(value, i.logits, i.one)

    calls = dict.fromkeys(backends, ours) | {
        EAGER: lambda i: theirs(eager.mixupe_loss, i, i.weight),
        COMPILE: lambda i: theirs(compiled, i, i.batch_lam),
    }
    if any(bar.against == FLOAT32 for bar in case.bars):
        inputs = inputs._replace(wide=inputs.logits.detach().float().requires_grad_())
        calls[FLOAT32] = lambda i: ours(i._replace(logits=i.wide))

    def run(provider: str, i: LossInputs, results: tuple[Tensor, ...]) -> float:
        errors = check.mixupe_loss_errors(*results, i.logits.detach(), i.target, i.eta, i.reg_weight, i.num_mixed)
        _within(errors[0], torch.float32, f"{provider}: loss")
        return _within(errors[1], results[1].dtype, f"{provider}: gradient")

    return Workload(inputs, calls, run, 3 * inputs.logits.nbytes)


def ce_entropy(case: Case, shape, device, backends, compiler) -> Workload:
    """The forward alone: reads the logits once."""
    inputs = _loss_inputs(*shape, shape[0], case.dtype, device)
    inputs = inputs._replace(logits=inputs.logits.detach())
    compiled = compiler(eager.ce_entropy)
    calls = dict.fromkeys(backends, lambda i: tuple(mk.ce_entropy(i.logits, i.mixed_target)))
    calls |= {
        EAGER: lambda i: eager.ce_entropy(i.logits, *i.target),
        COMPILE: lambda i: compiled(i.logits, *i.target),
    }

    def run(provider: str, i: LossInputs, results: tuple[Tensor, ...]) -> float:
        deviation = check.Deviation()
        for got, want in zip(results, check.ce_entropy(i.logits, i.target), strict=True):
            deviation.add(got, want)
        return _within(deviation.value, torch.float32, provider)

    return Workload(inputs, calls, run, inputs.logits.nbytes)


def ce_entropy_backward(case: Case, shape, device, backends, compiler) -> Workload:
    """The backward alone, from the saved entropy and lse: reads the logits once and writes their gradient."""
    inputs = _loss_inputs(*shape, shape[0], case.dtype, device)
    logits = inputs.logits.detach()
    _, entropy, lse = check.ce_entropy(logits, inputs.target)
    grad_ce, grad_entropy = torch.randn(2, shape[0], device=device)
    inputs = inputs._replace(
        logits=logits, grad_ce=grad_ce, grad_entropy=grad_entropy, entropy=entropy.float(), lse=lse.float()
    )
    compiled = compiler(eager.ce_entropy_backward)

    def ours(i: LossInputs) -> tuple[Tensor]:
        operator = torch.ops.mixupe.ce_entropy_backward
        return (operator(i.grad_ce, i.grad_entropy, None, i.logits, i.entropy, i.lse, *i.target),)

    def theirs(backward: Callable, i: LossInputs) -> tuple[Tensor]:
        return (backward(i.grad_ce, i.grad_entropy, i.logits, i.entropy, i.lse, *i.target),)

    calls = dict.fromkeys(backends, ours) | {
        EAGER: functools.partial(theirs, eager.ce_entropy_backward),
        COMPILE: functools.partial(theirs, compiled),
    }

    def run(provider: str, i: LossInputs, results: tuple[Tensor, ...]) -> float:
        upstream = (i.grad_ce.double(), i.grad_entropy.double(), None)
        error = check.gradient_error(results[0], upstream, i.logits, i.entropy.double(), i.lse.double(), i.target)
        return _within(error, results[0].dtype, provider)

    return Workload(inputs, calls, run, 2 * logits.nbytes)


def cross_entropy(case: Case, shape, device, backends, compiler, soft: bool = False) -> Workload:
    """Plain cross-entropy, forward and backward, where other libraries have a kernel: class indices or soft targets."""
    rows, classes = shape
    inputs = _loss_inputs(rows, classes, rows, case.dtype, device)
    if soft:
        weight = inputs.lam.unsqueeze(1)
        mixed = weight * F.one_hot(inputs.labels, classes) + (1 - weight) * F.one_hot(inputs.partner_labels, classes)
        inputs = inputs._replace(soft=mixed)
    else:
        inputs = inputs._replace(partner_labels=inputs.labels)
    compiled = compiler(eager.cross_entropy)

    def target_of(i: LossInputs) -> Tensor:
        return i.soft if soft else i.labels

    def call(loss: Callable) -> Callable:
        return lambda i: _with_gradient(loss(i.logits, target_of(i)), i.logits, i.one)

    calls = dict.fromkeys(backends, call(lambda logits, target: mk.ce_entropy(logits, target).ce.mean()))
    calls |= {EAGER: call(eager.cross_entropy), COMPILE: call(compiled)}
    calls |= {name: call(loss) for name, loss in (peers.soft_losses() if soft else peers.index_losses()).items()}

    def run(provider: str, i: LossInputs, results: tuple[Tensor, ...]) -> float:
        loss, gradient = results
        logits = i.logits.detach()
        ce, entropy, lse = check.ce_entropy(logits, i.target)
        deviation = check.Deviation()
        deviation.add(loss, ce.mean())
        # A peer may return its loss in the logits' dtype.
        _within(deviation.value, loss.dtype, f"{provider}: loss")
        upstream = (torch.full_like(ce, 1 / rows), None, None)
        error = check.gradient_error(gradient, upstream, logits, entropy, lse, i.target)
        return _within(error, gradient.dtype, f"{provider}: gradient")

    return Workload(inputs, calls, run, 3 * inputs.logits.nbytes + (2 * inputs.soft.nbytes if soft else 0))


WORKLOADS = {
    "mix": mix,
    "mix flip": mix_flip,
    "mix out=": mix_out,
    "mixed and clean out=": mixed_and_clean_out,
    "uint8 normalise mix": normalise_mix,
    "mixupe_loss": mixupe_loss,
    "ce_entropy": ce_entropy,
    "ce_entropy backward": ce_entropy_backward,
    "cross_entropy": cross_entropy,
    "cross_entropy, soft": functools.partial(cross_entropy, soft=True),
}
