"""γ, the weight of the clean rows' cross-entropy: RegMixup written out, on every backend and by every form of the loss."""

import pytest
import torch
import torch.nn.functional as F

import mixupe_kernels as mk

from .cases import thorough

MIXED, CLEAN, CLASSES, GAMMA, ETA = 5, 3, 7, 0.4, 0.3
ROWS = MIXED + CLEAN
FORMS = ("fused", "composed", "linear", "criterion")


@pytest.fixture
def logits():
    return (3 * torch.randn(ROWS, CLASSES, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def target():
    labels, partner_labels = torch.randint(CLASSES, (2, ROWS))
    lam = torch.rand(ROWS, dtype=torch.float64)
    partner_labels[MIXED:], lam[MIXED:] = labels[MIXED:], 1
    return mk.MixedTarget(labels, partner_labels, lam, MIXED, CLEAN, 0.3)


def loss_by(form, logits, target, *, eta=ETA, **options):
    if form == "composed":  # a function as the penalty
        return mk.mixupe_loss(logits, target, eta=eta, penalty=torch.abs, **options)
    if form == "linear":
        eye = torch.eye(CLASSES, dtype=logits.dtype)
        return mk.linear_mixupe_loss(logits, eye, target, eta=eta, chunk_rows=3, **options)
    if form == "criterion":
        return mk.MixupELoss(eta, **options)(logits, target)
    return mk.mixupe_loss(logits, target, eta=eta, **options)


def value_and_gradient(loss, logits):
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def regmixup(logits, target, smoothing=0.0, gamma=GAMMA):
    """RegMixup (Pinto et al., 2022): CE of the mixed rows and γ times that of the clean ones."""
    mixed, clean = logits[:MIXED], logits[MIXED:]
    own, other = (
        F.cross_entropy(mixed, labels[:MIXED], reduction="none", label_smoothing=smoothing) for labels in target[:2]
    )
    lam = target.lam[:MIXED]
    mix_loss = (lam * own + (1 - lam) * other).mean()
    return mix_loss + gamma * F.cross_entropy(clean, target.labels[MIXED:], label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
def test_without_eta_it_is_regmixup(backend, form, smoothing, logits, target):
    loss = loss_by(form, logits, target, eta=0.0, clean_weight=GAMMA, label_smoothing=smoothing)
    expected = regmixup(logits, target, smoothing)
    torch.testing.assert_close(value_and_gradient(loss, logits), value_and_gradient(expected, logits))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_with_eta_r_is_added_and_the_sum_rescaled(backend, form, rescale, logits, target):
    loss = loss_by(form, logits, target, clean_weight=GAMMA, rescale=rescale)
    clean = logits[MIXED:]
    q = ((F.one_hot(target.labels[MIXED:], CLASSES) - clean.softmax(1)) * clean).sum(1)
    cross_entropy = regmixup(logits, target)
    total = cross_entropy + ETA * target.reg_weight * q.abs().mean()
    expected = (cross_entropy / total).detach() * total if rescale else total
    torch.testing.assert_close(value_and_gradient(loss, logits), value_and_gradient(expected, logits))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_soft_labels(backend, activation, form, logits, target):
    soft = torch.rand(ROWS, CLASSES, dtype=torch.float64)
    target = target._replace(labels=soft, partner_labels=soft.flip(1))
    y = target.lam[:, None] * soft + (1 - target.lam[:, None]) * soft.flip(1)
    loss = loss_by(form, logits, target, eta=0.0, clean_weight=GAMMA, activation=activation)
    ce = -(y * logits.log_softmax(1)).sum(1)
    if activation == "sigmoid":
        ce = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
    expected = ce[:MIXED].mean() + GAMMA * ce[MIXED:].mean()
    torch.testing.assert_close(value_and_gradient(loss, logits), value_and_gradient(expected, logits))


@pytest.mark.parametrize("form", FORMS)
def test_ignored_rows_leave_the_clean_mean(backend, form, logits, target):
    labels, partner_labels = target.labels.clone(), target.partner_labels.clone()
    labels[-1] = partner_labels[-1] = -100
    loss = loss_by(form, logits, target._replace(labels=labels, partner_labels=partner_labels), clean_weight=GAMMA)
    fewer = target.rows(0, ROWS - 1)
    value, gradient = value_and_gradient(loss_by(form, logits[:-1], fewer, clean_weight=GAMMA), logits)
    torch.testing.assert_close(value_and_gradient(loss, logits), (value, gradient))
    assert (gradient[-1] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_without_clean_rows_it_weighs_nothing(backend, form, logits, target):
    """What ``Mixup`` makes, the steps of ``MixupE(interval=k)`` without clean rows, and plain labels."""
    for plain in (target._replace(num_mixed=ROWS, num_reg=0), target.labels):
        loss, expected = (loss_by(form, logits, plain, clean_weight=weight) for weight in (GAMMA, 0.0))
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


@pytest.mark.parametrize("form", FORMS)
def test_it_must_be_zero_where_r_is_of_mixed_rows(backend, form, logits, target):
    mixed = target._replace(num_mixed=ROWS, num_reg=ROWS)
    with pytest.raises(ValueError, match=r'^clean_weight must be 0 where R is of mixed rows \(regularize="mixed"\)'):
        loss_by(form, logits, mixed, clean_weight=GAMMA)
    loss_by(form, logits, mixed, clean_weight=0.0)
    with pytest.raises(ValueError, match="clean_weight must be 0"):  # the clean rows that q is of are not in the batch
        mk.MixupELoss(clean_weight=GAMMA)(logits, mixed, torch.randn(4))


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(backend, form, target):
    logits = torch.zeros(0, CLASSES, dtype=torch.float64, requires_grad=True)
    loss = loss_by(form, logits, target.rows(0, 0), clean_weight=GAMMA)
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, CLASSES)


@pytest.mark.parametrize("form", FORMS)
def test_clean_rows_alone(backend, form, logits, target):
    loss = loss_by(form, logits[MIXED:], target.rows(MIXED), eta=0.0, clean_weight=GAMMA)
    expected = GAMMA * F.cross_entropy(logits[MIXED:], target.labels[MIXED:])
    torch.testing.assert_close(value_and_gradient(loss, logits), value_and_gradient(expected, logits))


@pytest.mark.parametrize("form", ["fused", "composed", "criterion"])  # linear: 0·∞ in its matrix product
def test_a_gamma_of_zero_weighs_no_infinite_cross_entropy(backend, form, logits, target):
    """0·∞ is NaN: where γ is 0, a clean row that nothing regularizes has no part in the loss."""
    with torch.no_grad():
        logits[MIXED, target.labels[MIXED]] = -torch.inf
    target = target._replace(num_reg=CLEAN - 1)
    loss = loss_by(form, logits, target)
    value, gradient = value_and_gradient(loss, logits)
    assert value.isfinite() and (gradient[MIXED] == 0).all() and gradient.isfinite().all()
    assert loss_by(form, logits, target, clean_weight=GAMMA, rescale=False) == torch.inf


@pytest.mark.parametrize(
    "form", ["fused", "composed", *thorough("criterion")]
)  # which is the fused one, called by a module
def test_second_derivatives_are_differences(backend, form, logits, target):
    # Near points of η̂, a constant in every derivative, differ in it: so not rescaled.
    def loss(z):
        return loss_by(form, z, target, clean_weight=GAMMA, rescale=False)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_a_gamma_of_the_clean_fraction_counts_every_row_once():
    """With B mixed rows and ρB clean ones, L is the sum of all rows' cross-entropy over B."""
    labels = torch.randint(CLASSES, (32,))
    rows, target = mk.MixupE(clean_fraction=1 / 4)(torch.randn(32, 3, dtype=torch.float64), labels)
    assert len(rows) == 40
    z = rows @ torch.randn(3, CLASSES, dtype=torch.float64)
    loss = mk.mixupe_loss(z, target, eta=0.0, clean_weight=1 / 4)
    torch.testing.assert_close(loss, mk.ce_entropy(z, target).ce.sum() / 32)


def test_may_change_between_steps_and_not_before_the_backward(logits, target):
    criterion = mk.MixupELoss(ETA, clean_weight=GAMMA)
    loss = criterion(logits, target)
    expected = value_and_gradient(mk.mixupe_loss(logits, target, eta=ETA, clean_weight=GAMMA), logits)
    criterion.clean_weight = 2
    for _ in range(2):  # the second backward makes another gradient
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close((loss.detach(), gradient), expected)
    assert criterion.clean_weight == 2 and "clean_weight=2" in repr(criterion)
    assert torch.equal(criterion(logits, target), mk.mixupe_loss(logits, target, eta=ETA, clean_weight=2.0))
    with pytest.raises(ValueError, match="clean_weight must be a number >= 0, got -1"):
        criterion.clean_weight = -1
    assert criterion.clean_weight == 2


def test_last_holds_the_clean_loss(logits, target):
    for weight in (0.0, GAMMA):
        criterion = mk.MixupELoss(ETA, clean_weight=weight)
        loss = criterion(logits, target)
        mix_loss, clean_loss, reg, eta_hat = criterion.last
        torch.testing.assert_close(clean_loss, F.cross_entropy(logits[MIXED:], target.labels[MIXED:]).detach())
        torch.testing.assert_close(loss.detach(), eta_hat * (mix_loss + weight * clean_loss + ETA * reg))
        assert not clean_loss.requires_grad


def test_compiled_with_changing_weights_and_batches():
    model, criterion = torch.nn.Linear(3, CLASSES), mk.MixupELoss(ETA, clean_weight=GAMMA)

    def step(x, target):
        return criterion(model(x), target)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    mixer = mk.MixupE(clean_fraction=1 / 4)
    for batch, weight in ((8, GAMMA), (16, GAMMA), (12, 0.0), (8, 1.0)):
        criterion.clean_weight = weight
        x, target = mixer(torch.randn(batch, 3), torch.randint(CLASSES, (batch,)))
        losses = step(x, target), compiled(x, target)
        torch.testing.assert_close(*losses)
        for eager, graph in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses), strict=True):
            torch.testing.assert_close(eager, graph)
