"""What the host needs to issue the loss for a device, forward and backward, by the emulated library with its launches skipped.

Run as a process of its own (``python -m bench.host``): MIXUPE_EMULATED_ORDER is read when the library first runs. float16
logits take a device's path on the CPU: the gradient is made in the backward.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mixupe_kernels as mk
from mixupe_kernels.ops.losses import mixupe_loss_backward_op, mixupe_loss_op
from mixupe_kernels.ops.registration import apply_untransformed, below_autograd

from .cases import ENQUEUE, Row, Verdict

ROOT = Path(__file__).parents[1]
SHAPE = (256, 1000)
CASE = f"host's share of mixupe_loss {SHAPE[0]}×{SHAPE[1]}"
AT_MOST = 40.0  # µs
WHOLE = "forward and backward"


class _Nothing(torch.autograd.Function):
    """What autograd itself takes: a scalar of one tensor, whose gradient is new memory."""

    @staticmethod
    def forward(ctx, logits, value, gradient):
        ctx.gradient = gradient
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.gradient), None, None


class _Bare(torch.autograd.Function):
    """The two operators and what one hands the other, nothing asked or checked: the least that Python does."""

    @staticmethod
    def forward(ctx, logits, labels, partner_labels, lam, eta, reg_weight, num_mixed, num_reg):
        row_target = labels, partner_labels, lam
        loss, *stats = below_autograd(mixupe_loss_op, logits, *row_target, eta, reg_weight, num_mixed, num_reg)
        ctx.save_for_backward(logits, *row_target, *stats)
        ctx.num_mixed = num_mixed
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradient = below_autograd(mixupe_loss_backward_op, grad, *ctx.saved_tensors, ctx.num_mixed)
        return gradient, *[None] * 7


def parts() -> dict[str, Callable[[], object]]:
    """The whole call, then what it is made of."""
    rows, classes = SHAPE
    logits = torch.randn(rows, classes, dtype=torch.float16, requires_grad=True)
    labels, lam, mixed = torch.randint(classes, (rows,)), torch.rand(rows), rows * 4 // 5
    weight, one = torch.tensor(0.3), torch.tensor(1.0)
    target = mk.MixedTarget(labels, labels.flip(0), lam, mixed, rows - mixed, weight)
    criterion, eta = mk.MixupELoss(), torch.tensor(1e-3)
    forward = (logits.detach(), *target[:3], eta, weight, mixed, rows - mixed)
    _, *stats = mixupe_loss_op(*forward)
    backward = (one, *forward[:4], *stats, mixed)
    out = torch.empty_like(forward[0])
    bare = apply_untransformed(_Bare)

    def whole():
        logits.grad = None
        criterion(logits, target).backward()

    def operators():
        logits.grad = None
        bare(logits, *forward[1:]).backward()

    def nothing():
        logits.grad = None
        _Nothing.apply(logits, weight, out).backward()

    def without_gradient():
        with torch.no_grad():
            criterion(logits, target)

    return {
        WHOLE: whole,
        "the two operators in a bare Function": operators,
        "a Function of nothing": nothing,
        "criterion, forward alone": lambda: criterion(logits, target),
        "criterion, no gradient": without_gradient,
        "operator, forward": lambda: below_autograd(mixupe_loss_op, *forward),
        "operator, backward": lambda: below_autograd(mixupe_loss_backward_op, *backward),
    }


def seconds(call: Callable[[], object], turns: int = 41, calls: int = 50) -> float:
    """The median turn's, a call."""
    times = []
    for _ in range(turns):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def measure() -> tuple[list[Row], list[Verdict]]:
    """A row for each part, and the bar; without figures where the library is not built (``make test`` builds it)."""
    environment = {**os.environ, "MIXUPE_EMULATED_ORDER": "none", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.host"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if run.returncode:
        note = (run.stderr.strip().splitlines() or ["no output"])[-1]
        return [Row(CASE, WHOLE, note=note)], [Verdict(CASE, ENQUEUE, AT_MOST)]
    found = json.loads(run.stdout)
    rows = [Row(CASE, part, enqueue_seconds=time, seconds=time, error=0.0) for part, time in found.items()]
    measured = 1e6 * found[WHOLE]
    return rows, [Verdict(CASE, ENQUEUE, AT_MOST, measured, measured <= AT_MOST)]


def main() -> None:
    torch.set_num_threads(1)
    with mk.use_backend("cuda_emulated"):
        calls = parts()
        for call in calls.values():
            seconds(call, turns=3)
        print(json.dumps({name: seconds(call) for name, call in calls.items()}))


if __name__ == "__main__":
    main()
