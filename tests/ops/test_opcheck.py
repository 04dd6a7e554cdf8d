"""``torch.library.opcheck`` of every operator: schema, fake, autograd, and compiled graphs of changing sizes."""

import pytest
import torch

import mixupe_kernels as mk

from ..cases import make_target
from .test_sums import many_to_one

ops = torch.ops.mixupe


def opcheck_cases():
    z, zb = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True)
    labels, partner_labels, lam = make_target("mixed", (6, 5), torch.float32)
    partner, y = torch.randint(6, (6,)), torch.rand(6, 5)
    eta, weight = torch.tensor(0.3), torch.tensor(0.25)
    _, entropy, lse = (t.detach() for t in ops.ce_entropy(z, labels, partner_labels, lam))
    _, *saved = (t.detach() for t in ops.mixupe_loss(z, labels, partner_labels, lam, eta, weight, 3, 3))
    x = torch.randn(6, 3, 4, 4, requires_grad=True)
    pixels = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    index, term_weight, offsets = many_to_one(6, 9)
    activations, channel = x.detach(), {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    statistics = torch.rand(2, 3)
    loss_tail = (labels, partner_labels, lam, *saved, 3)
    return [
        ("mix", (x, partner, lam), {}),
        ("mix", (x, None, torch.tensor(0.3)), {}),
        ("mix", (pixels, partner, lam, labels, torch.rand(3), torch.rand(3), torch.float32, torch.channels_last), {}),
        ("mix", (x, partner, lam, None, None, None, None, None, torch.tensor([0, 2, 1, 4])), {}),
        ("mix_out", (x.detach(), partner, lam), {"out": torch.empty(6, 3, 4, 4)}),
        ("mixed_target", (labels, partner, lam.clone().requires_grad_(), index, 4), {}),
        ("mixed_target", (labels, None, torch.tensor(0.3), labels[:3], 2), {}),
        ("gather_sum", (x, index, term_weight.requires_grad_(), offsets), {}),
        ("row_dot", (x, x.detach().requires_grad_(), index, index.flip(0)), {}),
        ("normalise_apart", (activations, torch.rand(3), torch.rand(3), 4, 0.1, 1e-5), channel),
        ("normalise_apart", (activations, None, None, 4, 0.1, 1e-5), dict.fromkeys(channel)),
        ("normalise_apart_backward", (activations, activations, torch.rand(3), statistics, statistics, 4), {}),
        ("ce_entropy", (z, labels), {}),
        ("ce_entropy", (zb, labels, partner_labels, lam), {}),
        ("ce_entropy", (z, y, None, None, torch.rand(5), 0.1, -100, False), {}),
        ("ce_entropy", (z, y, None, None, None, 0.0, -100, True), {}),
        ("ce_entropy_backward", (lam, lam, None, z, entropy, lse, labels, partner_labels, lam), {}),
        ("mixupe_loss", (z, labels, partner_labels, lam, eta, weight, 3, 3), {}),
        ("mixupe_loss", (zb, labels, None, None, eta, weight, 6, 6, 1, 0.5, False, 0.1, False), {}),
        ("mixupe_loss", (z, labels, partner_labels, lam, eta, weight, 3, 2, 0, 1.0, True, 0.0, False, 0.25), {}),
        ("mixupe_loss_with_gradient", (z, labels, None, None, eta, weight, 4, 2), {"clean_weight": 0.25}),
        ("mixupe_loss_with_gradient", (z, labels, partner_labels, lam, eta, weight, 3, 3), {}),
        ("mixupe_loss_backward", (eta, z, *loss_tail), {}),
        ("mixupe_loss_backward_out", (eta, z.detach(), *loss_tail), {"out": torch.empty(6, 5)}),
    ]


NAMES = [name for name, *_ in opcheck_cases()]


@pytest.mark.parametrize("case", range(len(NAMES)), ids=[f"{name}-{case}" for case, name in enumerate(NAMES)])
def test_opcheck(backend, slow, case):
    name, args, kwargs = opcheck_cases()[case]
    # Autograd and compiled graphs are the same Python over every backend; what a kernel returns and writes is its own.
    own = {"test_utils": ("test_schema", "test_faketensor")} if slow else {}
    torch.library.opcheck(getattr(ops, name).default, args, kwargs, **own)


def test_opcheck_covers_every_operator():
    assert set(NAMES) == set(mk.ops.operators())
