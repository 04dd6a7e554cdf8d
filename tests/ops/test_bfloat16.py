"""Gradients in bfloat16 and float16: computed in float32 and rounded once, by every way there is to round."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk

from ..cases import compute, make_logits, thorough
from ..conftest import INTERPRETED

ops = torch.ops.mixupe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_near_certainty_is_rounded_once(backend, dtype):
    # p → 1 at the label: p - y must be formed before rounding, or bfloat16 loses all of it.
    logits = torch.zeros(4, 5, dtype=dtype)
    logits[:, 2] = 8.0
    labels = torch.full((4,), 2)
    _, entropy, lse = ops.ce_entropy(logits, labels)
    dz = ops.ce_entropy_backward(torch.ones(4), None, None, logits, entropy, lse, labels)
    expected = (logits.double().softmax(1)[:, 2] - 1).to(dtype)
    assert (expected != 0).all()
    torch.testing.assert_close(dz[:, 2], expected)


def test_gradient_survives_p_that_rounds_to_one(backend):
    logits = torch.zeros(3, 1000, dtype=torch.bfloat16)
    logits[:, 4] = torch.tensor([16.0, 18.0, 20.0], dtype=torch.bfloat16)
    labels = torch.full((3,), 4)
    _, entropy, lse = compute("ce_entropy", logits, labels)
    dz = compute("ce_entropy_backward", torch.ones(3), None, None, logits, entropy, lse, labels)
    # lse and p carry a rounding of float32 each, at 20 and at 1.
    assert (dz.actual.double() - dz.truth)[:, 4].abs().max() < 4 * 20 * torch.finfo(torch.float32).eps
    assert (dz.actual[:, 4] < 0).all()


# Every remainder of the vector widths and of the steps of a row, and rows past a block.
LENGTHS = [
    1,
    3,
    63,
    65,
    257,
    *thorough(2, *range(4, 63), 64, *range(66, 71), *range(126, 131), 159, 160, 161, 255, 257, 2047, 2049),
]


@pytest.mark.parametrize("classes", LENGTHS)
def test_gradients_of_any_length_and_label(backend, classes):
    labels = torch.arange(classes)[-128:]
    rows = len(labels)
    logits = make_logits((rows, classes), torch.bfloat16)
    target = (labels, labels.flip(0), torch.rand(rows))
    upstream = torch.randn(3, rows)
    _, entropy, lse = compute("ce_entropy", logits, *target)
    dz = compute("ce_entropy_backward", *upstream, logits, entropy, lse, *target)
    # Half an ulp, and what rounding in float32 may add to it. Triton's interpreter cuts bits off where devices round.
    bound = (1.01 if INTERPRETED else 0.51) * torch.finfo(
        torch.bfloat16
    ).eps * dz.truth.abs() + 1e-6 * upstream.abs().amax(0)[:, None]
    assert ((dz.actual.double() - dz.truth).abs() <= bound).all()


# CUDA's NaN has all its bits set; to round it as integers could carry it over into -0.
def nan_of_all_bits():
    return torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)


def gradient_of_fixed_logits():
    """A digest of bfloat16 gradients, of a backward and made with a loss, from exact inputs; one row of each is NaN."""
    logits = ((torch.arange(64 * 1000) * 7919 % 1001 - 500) / 64).view(64, 1000).bfloat16()
    labels, lam = torch.arange(64) * 15, torch.arange(64) / 64
    _, entropy, lse = ops.ce_entropy(logits, labels, labels.flip(0), lam)
    grad_ce = lam.clone()
    grad_ce[5] = nan_of_all_bits()
    dz = ops.ce_entropy_backward(grad_ce, -lam, None, logits, entropy, lse, labels, labels.flip(0), lam)
    assert dz[5].isnan().all() and dz.isnan().sum() == 1000
    scalars = (nan_of_all_bits()[0], torch.tensor(0.3), 63, 1, 0, 0.5, False)
    _, _, whole = ops.mixupe_loss_with_gradient(logits, labels, labels.flip(0), lam, *scalars)
    assert whole[63].isnan().all() and whole.isnan().sum() == 1000
    rescaled = (*scalars[:-1], True)
    assert ops.mixupe_loss_with_gradient(logits, labels, labels.flip(0), lam, *rescaled)[2].isnan().all()
    gradients = torch.cat([dz, whole]).nan_to_num()
    return hashlib.sha256(gradients.view(torch.int16).numpy().tobytes()).hexdigest()


@pytest.mark.skipif("cpp" not in mk.available_backends(), reason="the compiled backend is not built")
def test_every_way_of_rounding_to_bfloat16_is_the_same():
    # By an instruction, where the machine has it, and as integers, which torch's switch for its own kernels brings back.
    with mk.use_backend("cpp"):
        expected = gradient_of_fixed_logits()
    code = "import mixupe_kernels; from tests.ops.test_bfloat16 import gradient_of_fixed_logits as g; print(g())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_of_any_bits_stays_one(backend, dtype):
    nan, logits, labels = nan_of_all_bits(), make_logits((1, 70), dtype), torch.tensor([3])
    _, entropy, lse = ops.ce_entropy(logits, labels)
    for gradients in ((nan, None, None), (None, nan, None), (None, None, nan)):
        assert ops.ce_entropy_backward(*gradients, logits, entropy, lse, labels).isnan().all()
    logits[0, 7] = nan
    for output in ops.ce_entropy(logits, labels):
        assert output.isnan().all()
