"""The cases of a training step under torch.compile: see ``workloads``."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mixupe_kernels as mk

from . import check, eager, models
from .cases import COMPILE, Case
from .workload import ETA, Workload, within

CLEAN_FRACTION = 1 / 4
# So small that a model is what it was after the thousands of steps on one batch that are timed.
LEARNING_RATE = 1e-9


class StepInputs(NamedTuple):
    """A mixed batch, its target and η, as a tensor for the loss in plain torch."""

    x: Tensor
    target: mk.MixedTarget
    eta: Tensor


def compiled_step(case: Case, shape, device, backends, compiler: Callable) -> Workload:
    """Forward, backward and Adam of MixupE's tabular network, all but the optimizer compiled: our loss beside the loss in plain
    torch, which the compiler fuses. ``shape`` is (B, features, classes); a quarter of the batch is clean rows besides.
    """
    batch, features, classes = shape
    dtype = getattr(torch, case.dtype)
    model = models.mlp(features, classes).to(device, dtype)
    x, labels = (
        torch.randn(batch, features, dtype=dtype, device=device),
        torch.randint(classes, (batch,), device=device),
    )
    mixed = mk.MixupE(alpha=1.0, clean_fraction=CLEAN_FRACTION)(x, labels)
    inputs = StepInputs(*mixed, torch.tensor(ETA, device=device))

    def step_with(loss: Callable[[Tensor, StepInputs], Tensor]) -> Callable:
        trained = copy.deepcopy(model)
        optimizer = torch.optim.Adam(trained.parameters(), lr=LEARNING_RATE)

        @compiler
        def forward(i: StepInputs) -> Tensor:
            return loss(trained(i.x), i)

        def step(i: StepInputs) -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            value = forward(i)
            value.backward()
            optimizer.step()
            return value.detach(), *(parameter.grad for parameter in trained.parameters())

        return step

    criterion = mk.MixupELoss(eta=ETA)

    def ours(logits: Tensor, i: StepInputs) -> Tensor:
        return criterion(logits, i.target)

    def written_out(logits: Tensor, i: StepInputs) -> Tensor:
        labels, partner_labels, lam, num_mixed, _, reg_weight, *_ = i.target
        return eager.mixupe_loss(logits, labels, partner_labels, lam[0], i.eta, reg_weight, num_mixed)

    calls = {name: step_with(ours) for name in backends} | {COMPILE: step_with(written_out)}

    def check_result(provider: str, i: StepInputs, results: tuple[Tensor, ...]) -> float:
        wide: nn.Module = copy.deepcopy(model).double()
        loss = mk.mixupe_loss(wide(i.x.double()), i.target, eta=ETA)
        deviation = check.Deviation()
        deviation.add(results[0], loss.detach())
        for got, want in zip(results[1:], torch.autograd.grad(loss, list(wide.parameters())), strict=True):
            deviation.add(got, want)
        return within(deviation.value, dtype, provider)

    return Workload(inputs, calls, check_result, 3 * mixed[0].shape[0] * classes * dtype.itemsize, trains=True)
