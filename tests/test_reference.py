"""The reference against the papers' formulas, written out naively in float64."""

import pytest
import torch
import torch.nn.functional as F

import mixupe_kernels as mk
from mixupe_kernels import conventions
from mixupe_kernels.ops import RowGradients, RowOptions, RowStats, RowTarget, reference

from .cases import make_target

ROWS, CLASSES = 12, 7


def naive_target(target, partner, lam, smoothing=0.0):
    """y as a user would write it: one-hot vectors, smoothed, mixed."""
    if target.dim() == 2:
        return target * (1 - smoothing) + smoothing / CLASSES
    own = F.one_hot(target, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES
    if partner is None:
        return own
    other = F.one_hot(partner, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES
    return lam[:, None] * own + (1 - lam[:, None]) * other


@pytest.fixture
def logits():
    return (torch.randn(ROWS, CLASSES, dtype=torch.float64) * 3).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "mixed", "dense"])
def test_ce_entropy_is_the_formula(logits, kind, smoothing):
    target = make_target(kind, (ROWS, CLASSES), torch.float64)
    y = naive_target(*target, smoothing)
    p = logits.softmax(1)
    expected_ce, expected_entropy = -(y * p.log()).sum(1), -(p * p.log()).sum(1)
    expected_lse = logits.exp().sum(1).log()
    target, options = RowTarget(*target), RowOptions(label_smoothing=smoothing)
    ce, entropy, lse = reference.ce_entropy(logits, target, options)
    torch.testing.assert_close(ce, expected_ce)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(lse, expected_lse)
    upstream = torch.randn(3, ROWS, dtype=torch.float64)
    (expected,) = torch.autograd.grad((expected_ce, expected_entropy, expected_lse), logits, tuple(upstream))
    stats = RowStats(entropy, lse)
    actual = reference.ce_entropy_backward(RowGradients(*upstream), logits, stats, target, options)
    torch.testing.assert_close(actual, expected)


def test_sigmoid_ce_entropy_is_the_formula(logits):
    y = torch.rand(ROWS, CLASSES, dtype=torch.float64)
    sigma = logits.sigmoid()
    expected_ce = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
    expected_entropy = -(sigma * sigma.log() + (1 - sigma) * (1 - sigma).log()).sum(1)
    expected_partition = F.softplus(logits).sum(1)
    target, options = RowTarget(y), RowOptions(sigmoid=True)
    ce, entropy, partition = reference.ce_entropy(logits, target, options)
    torch.testing.assert_close(ce, expected_ce)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(partition, expected_partition)
    torch.testing.assert_close(entropy - ce, ((y - sigma) * logits).sum(1))
    upstream = torch.randn(3, ROWS, dtype=torch.float64)
    (expected,) = torch.autograd.grad((expected_ce, expected_entropy, expected_partition), logits, tuple(upstream))
    stats = RowStats(entropy, partition)
    actual = reference.ce_entropy_backward(RowGradients(*upstream), logits, stats, target, options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mass", [1.0, 0.3, 1.7])
def test_q_hat_is_the_residual_times_the_logits(logits, mass):
    y = torch.rand(ROWS, CLASSES, dtype=torch.float64)
    y = mass * y / y.sum(1, keepdim=True)
    torch.testing.assert_close(mk.q_hat(logits, y), ((y - logits.softmax(1)) * logits).sum(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_index_targets_are_cross_entropys(logits, weighted, smoothing):
    labels = torch.randint(CLASSES, (ROWS,))
    labels[3] = labels[5] = -100
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1 if weighted else None
    expected = F.cross_entropy(logits, labels, weight=weight, reduction="none", label_smoothing=smoothing)
    actual = mk.ce_entropy(logits, labels, class_weight=weight, label_smoothing=smoothing).ce
    torch.testing.assert_close(actual, expected)


def naive_loss(logits, target, y, eta, gamma, penalty, rescale, threshold, sigmoid=False):
    """MixupE eq. 5-9 with RegMixup's term, term by term."""
    p = logits.sigmoid() if sigmoid else logits.softmax(1)
    ce = -(y * logits.log_softmax(1)).sum(1)
    if sigmoid:
        ce = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
    mix_loss = ce[: target.num_mixed].mean()
    clean = slice(logits.shape[0] - target.num_reg, None)
    q = ((y - p) * logits).sum(1)[clean]
    detached = ((y - p).detach() * logits).sum(1)[clean]
    n = max(target.num_reg, 1)
    reg = {
        "abs": q.abs().sum() / n,
        "threshold": -(q * (q < threshold)).sum() / n,
        "linear_detached": -detached.sum() / n,
    }
    clean_loss = ce[target.num_mixed :].sum() / max(logits.shape[0] - target.num_mixed, 1)
    cross_entropy = mix_loss + gamma * clean_loss
    total = cross_entropy + eta * target.reg_weight * reg[penalty]
    eta_hat = (cross_entropy.abs() / total.abs()).detach() if rescale else 1.0
    return eta_hat * total


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("penalty", conventions.PENALTIES)
@pytest.mark.parametrize("kind", ["mixed", "dense", "sigmoid"])
@pytest.mark.parametrize("counts", [(6, 6), (12, 12), (8, 4), (12, 0)], ids=["halves", "mixed", "split", "none"])
def test_mixupe_loss_is_the_papers(logits, kind, counts, penalty, rescale):
    gamma = 0.0 if counts == (12, 12) else 0.6
    labels, partner, lam = make_target("mixed", (ROWS, CLASSES), torch.float64)
    target = mk.MixedTarget(labels, partner, lam, *counts, 1 / 3)
    y = naive_target(labels, partner, lam)
    if kind != "mixed":
        soft = torch.rand(2, ROWS, CLASSES, dtype=torch.float64)
        target = target._replace(labels=soft[0], partner_labels=soft[1])
        y = lam[:, None] * soft[0] + (1 - lam[:, None]) * soft[1]
    options = {"penalty": penalty, "rescale": rescale, "threshold": 0.4}
    expected = naive_loss(logits, target, y, 0.7, gamma, sigmoid=kind == "sigmoid", **options)
    activation = "sigmoid" if kind == "sigmoid" else "softmax"
    actual = mk.mixupe_loss(logits, target, eta=0.7, clean_weight=gamma, activation=activation, **options)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)))


def test_penalty_may_be_a_function(logits):
    labels, partner, lam = make_target("mixed", (ROWS, CLASSES), torch.float64)
    target = mk.MixedTarget(labels, partner, lam, 8, 4, 0.25)
    named = mk.mixupe_loss(logits, target, eta=0.5)
    own = mk.mixupe_loss(logits, target, eta=0.5, penalty=lambda q: q.abs())
    torch.testing.assert_close(named, own)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (named, own)))
    with pytest.raises(ValueError, match="penalty must return one value for each"):
        mk.mixupe_loss(logits, target, eta=0.5, penalty=lambda q: q.mean())


def test_eta_hat_is_one_where_its_denominator_is_zero():
    logits = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)  # one class: L_mix = R = 0
    target = mk.MixedTarget(
        torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.ones(4), 2, 2, 0.5
    )
    criterion = mk.MixupELoss(eta=1.0)
    loss = criterion(logits, target)
    loss.backward()
    assert loss == 0 and criterion.last.eta_hat == 1 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_mix_is_the_formula():
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    partner, lam = torch.tensor([1, 1, 4, 0, 2]), torch.tensor([0.2, 0.0, 1.0, 0.7, 0.5], dtype=torch.float64)
    expected = torch.stack([lam[i] * x[i] + (1 - lam[i]) * x[partner[i]] for i in range(5)])
    torch.testing.assert_close(mk.mix(x, partner, lam), expected)
    torch.testing.assert_close(mk.mix(x, "flip", 0.25), 0.25 * x + 0.75 * x.flip(0))


def test_mixing_many_is_the_formula():
    x = torch.randn(4, 3, dtype=torch.float64)
    partner, weight = torch.randint(4, (4, 3)), torch.rand(4, 3, dtype=torch.float64)
    expected = torch.stack([sum(weight[i, k] * x[partner[i, k]] for k in range(3)) for i in range(4)])
    torch.testing.assert_close(mk.mix(x, partner, weight), expected)
