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

from . import check, compiled_step, eager, mixing, peers
from .cases import COMPILE, CROSS_ENTROPY, EAGER, FLOAT32, LINEAR_CROSS_ENTROPY, Case
from .workload import ETA, Workload, within


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
    if any(bar.against == CROSS_ENTROPY for bar in case.bars):
        calls[CROSS_ENTROPY] = lambda i: _with_gradient(F.cross_entropy(i.logits, i.labels), i.logits, i.one)

    def run(provider: str, i: LossInputs, results: tuple[Tensor, ...]) -> float:
        if provider == CROSS_ENTROPY:
            deviation = check.Deviation()
            deviation.add(results[0], F.cross_entropy(i.logits.detach().double(), i.labels))
            return within(deviation.value, results[0].dtype, provider)
        errors = check.mixupe_loss_errors(*results, i.logits.detach(), i.target, i.eta, i.reg_weight, i.num_mixed)
        within(errors[0], torch.float32, f"{provider}: loss")
        return within(errors[1], results[1].dtype, f"{provider}: gradient")

    return Workload(inputs, calls, run, 3 * inputs.logits.nbytes)


class LinearInputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    target: mk.MixedTarget


def linear_loss(case: Case, shape, device, backends, compiler) -> Workload:
    """Classifier and loss in one, forward and backward, three quarters of the rows mixed; beside plain cross-entropy's."""
    (rows, features, classes), dtype = shape, getattr(torch, case.dtype)
    hidden = torch.randn(rows, features, dtype=dtype, device=device).requires_grad_()
    weight = (torch.randn(classes, features, dtype=dtype, device=device) / features**0.5).requires_grad_()
    inputs = _loss_inputs(rows, classes, rows * 3 // 4, "float32", device)
    inputs = LinearInputs(hidden, weight, inputs.labels, inputs.mixed_target)

    def call(loss: Callable) -> Callable:
        def run(i: LinearInputs) -> tuple[Tensor, ...]:
            value = loss(i)
            return value.detach(), *torch.autograd.grad(value, (i.hidden, i.weight))

        return run

    calls = dict.fromkeys(backends, call(lambda i: mk.linear_mixupe_loss(i.hidden, i.weight, i.target, eta=ETA)))
    calls |= {
        EAGER: call(lambda i: mk.mixupe_loss(F.linear(i.hidden, i.weight), i.target, eta=ETA)),
        LINEAR_CROSS_ENTROPY: call(lambda i: F.linear_cross_entropy(i.hidden, i.weight, i.labels)),
    }

    def check_result(provider: str, i: LinearInputs, results: tuple[Tensor, ...]) -> float:
        wide = LinearInputs(*(part.detach().double().requires_grad_() for part in i[:2]), *i[2:])
        plain = provider == LINEAR_CROSS_ENTROPY
        logits = F.linear(wide.hidden, wide.weight)
        loss = F.cross_entropy(logits, i.labels) if plain else mk.mixupe_loss(logits, i.target, eta=ETA)
        deviation = check.Deviation()
        deviation.add(results[0], loss.detach())
        for got, want in zip(results[1:], torch.autograd.grad(loss, wide[:2]), strict=True):
            deviation.add(got, want)
        return within(deviation.value, dtype, provider)

    return Workload(inputs, calls, check_result, 3 * rows * classes * dtype.itemsize)


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
        return within(deviation.value, torch.float32, provider)

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
        return within(error, results[0].dtype, provider)

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
        # A peer may compute in the logits' dtype, whatever the dtype of its loss: timm's of float32 targets is float32.
        within(deviation.value, loss.dtype if provider in backends else logits.dtype, f"{provider}: loss")
        upstream = (torch.full_like(ce, 1 / rows), None, None)
        error = check.gradient_error(gradient, upstream, logits, entropy, lse, i.target)
        return within(error, gradient.dtype, f"{provider}: gradient")

    return Workload(inputs, calls, run, 3 * inputs.logits.nbytes + (2 * inputs.soft.nbytes if soft else 0))


WORKLOADS = {
    "mix": mixing.mix,
    "mix flip": mixing.mix_flip,
    "mix out=": mixing.mix_out,
    "mixed and clean out=": mixing.mixed_and_clean_out,
    "uint8 normalise mix": mixing.normalise_mix,
    "mixupe_loss": mixupe_loss,
    "linear loss": linear_loss,
    "compiled step": compiled_step.compiled_step,
    "ce_entropy": ce_entropy,
    "ce_entropy backward": ce_entropy_backward,
    "cross_entropy": cross_entropy,
    "cross_entropy, soft": functools.partial(cross_entropy, soft=True),
}
