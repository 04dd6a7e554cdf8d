"""What R does to a model: where each penalty pushes, how much of the gradient it is, and what too large an η ends in."""

import math

import pytest
import torch
from torch import nn

import mixupe_kernels as mk

ROWS, CLASSES, W, ETA = 12, 5, 0.3, 0.7


@pytest.fixture
def logits():
    """Clean rows of class 0, told right and with confidence to spare: q̂ > 0 for all."""
    z = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    z[:, 0] += 2
    z = z[mk.q_hat(z, labels_of(z)) > 0]
    assert len(z) >= ROWS / 2
    return z.requires_grad_()


def labels_of(logits):
    return torch.zeros(len(logits), dtype=torch.int64)


def clean(logits):
    """The target of clean rows alone, so that the loss is η·R."""
    labels = labels_of(logits)
    return mk.MixedTarget(labels, labels, torch.ones(len(labels), dtype=torch.float64), 0, len(labels), W)


def gradient_of_r(logits, penalty, threshold=10.0):
    loss = mk.mixupe_loss(logits, clean(logits), eta=1.0, penalty=penalty, threshold=threshold, rescale=False)
    return torch.autograd.grad(loss, logits)[0]


def terms(logits):
    ce, entropy, _ = mk.ce_entropy(logits, labels_of(logits))
    return ce, entropy


def test_abs_lowers_h_minus_ce_and_threshold_raises_it(backend, logits):
    ce, entropy = terms(logits)
    (expected,) = torch.autograd.grad(W * (entropy - ce).mean(), logits)
    torch.testing.assert_close(gradient_of_r(logits, "abs"), expected)
    torch.testing.assert_close(gradient_of_r(logits, "threshold"), -expected)
    # Past the threshold it pushes nowhere.
    assert (gradient_of_r(logits, "threshold", threshold=0.0) == 0).all()


def test_linear_detached_is_cross_entropy(backend, logits):
    ce, _ = terms(logits)
    (expected,) = torch.autograd.grad(W * ce.mean(), logits)
    torch.testing.assert_close(gradient_of_r(logits, "linear_detached"), expected)


@pytest.mark.parametrize("rescale", [False, True])
def test_linear_detached_is_regmixup_with_gamma_eta_w(backend, logits, rescale):
    """The gradients are equal, but for the factor η̂, which is not the same for the two."""
    mixed = 4
    partner_labels = labels_of(logits)
    partner_labels[:mixed] = 1
    lam = torch.ones(len(logits), dtype=torch.float64)
    lam[:mixed] = 0.4
    target = mk.MixedTarget(labels_of(logits), partner_labels, lam, mixed, len(logits) - mixed, W)
    criteria = (
        mk.MixupELoss(ETA, "linear_detached", rescale=rescale),
        mk.MixupELoss(0.0, clean_weight=ETA * W, rescale=rescale),
    )
    ours, regmixup = (
        torch.autograd.grad(criterion(logits, target), logits)[0] / criterion.last.eta_hat for criterion in criteria
    )
    torch.testing.assert_close(ours, regmixup)
    assert criteria[1].last.eta_hat == 1 and (criteria[0].last.eta_hat == 1) == (not rescale)


@pytest.mark.parametrize(
    "penalty, falls",
    [
        ("abs", lambda ce, entropy: entropy - ce),
        ("threshold", lambda ce, entropy: ce - entropy),
        ("linear_detached", lambda ce, entropy: ce),
    ],
)
def test_a_step_down_r_lowers_this_of_every_row(backend, logits, penalty, falls):
    step = 1e-4 * gradient_of_r(logits, penalty)
    assert (falls(*terms(logits - step)) < falls(*terms(logits))).all()


def test_abs_has_two_ways_to_zero():
    """q̂ of two classes is (1 - p)·a at a lead of a logits. It is 0 at p = 1/2 and at p = 1 and largest where a·p = 1, at a
    lead of 1.278: less confident rows are pushed towards uniform predictions, more confident ones towards certainty."""
    a = torch.tensor([0.5, 1.2, 1.35, 5.0], dtype=torch.float64)
    logits = torch.stack([a, torch.zeros_like(a)], 1).requires_grad_()
    own = gradient_of_r(logits, "abs")[:, 0]
    p = a.sigmoid()
    torch.testing.assert_close(own, W / 4 * (1 - p) * (1 - a * p))
    assert (own > 0).tolist() == [True, True, False, False]  # a step goes against the gradient


@pytest.fixture
def one_thread():
    """Steps this small take many times as long where two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(eta, steps=200):
    """A small network trained at this η on three overlapping clouds of points: its logits of the last batch, that batch's
    target, and CE, H and the share of errors on the clean points."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    x = 2 * torch.eye(3, 4)[labels] + 0.7 * torch.randn(240, 4, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    mixup_fn, criterion = mk.MixupE(alpha=1.0, generator=generator), mk.MixupELoss(eta)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        rows, target = mixup_fn(x, labels)
        optimizer.zero_grad()
        criterion(model(rows), target).backward()
        optimizer.step()
    ce, entropy, _ = mk.ce_entropy(model(x), labels)
    wrong = (model(x).argmax(1) != labels).float().mean()
    return model(rows).detach().double().requires_grad_(), target, ce.detach(), entropy.detach(), wrong


def test_at_the_papers_eta_r_is_a_thousandth_of_the_gradient_at_most(one_thread):
    logits, target, ce, entropy, wrong = trained(1e-3)
    assert wrong < 0.1 and (entropy > ce).float().mean() > 0.75  # q̂ > 0 for most clean rows
    rows = mk.ce_entropy(logits, target)
    (of_mix,) = torch.autograd.grad(rows.ce[: target.num_mixed].mean(), logits)
    of_clean = target.rows(target.num_mixed)
    loss = mk.mixupe_loss(logits[target.num_mixed :], of_clean, eta=1e-3, rescale=False)
    (of_r,) = torch.autograd.grad(loss, logits)
    assert 1e-4 < of_r.norm() / of_mix.norm() < 1e-3


def test_a_large_eta_ends_in_uniform_predictions(one_thread):
    """There H = CE = log C, so that R = 0: the model has learnt nothing, and the loss is content."""
    _, _, ce, entropy, wrong = trained(10.0)
    assert wrong > 0.3
    assert entropy.mean() > 0.99 * math.log(3) and ce.mean() > 0.97 * math.log(3)
    assert (entropy - ce).abs().mean() < 0.02
    *_, learnt_entropy, _ = trained(1.0)
    assert learnt_entropy.mean() < 0.4 * math.log(3)  # not so at η = 1
