"""A label of -100 among more than two mixed samples: its part of a row's weights leaves both means, as with two samples."""

import pytest
import torch
from torch.nn.functional import one_hot

import mixupe_kernels as mk

CLASSES, TERMS, ROWS, MIXED = 5, 3, 14, 8
RULES = {"abs": torch.abs, "threshold": lambda q: torch.where(q < 0.3, -q, 0.0)}


class Case:
    """Mixed rows of three samples and clean rows of one, some of whose labels are ignored, and their target."""

    def __init__(self, split=MIXED, whole=False):
        self.weights = torch.rand(ROWS, TERMS, dtype=torch.float64).softmax(1)
        self.labels = torch.randint(CLASSES, (ROWS, TERMS))
        self.weights[split:] = torch.tensor([1.0, 0, 0])  # clean
        if not whole:
            self.labels[[0, 0, 1, 3, 3, 3], [0, 1, 2, 0, 1, 2]] = -100  # two samples of a row, one, and all of them
            self.weights[4], self.labels[4, 2] = torch.tensor([0.25, 0.75, 0]), -100  # ignored, and of no weight
            self.labels[[9, 12], 0] = -100
        self.kept = self.labels != -100
        self.share = (self.weights * self.kept).sum(1)
        self.y = (self.weights.unsqueeze(2) * one_hot(self.labels.where(self.kept, 0), CLASSES)).mul(
            self.kept.unsqueeze(2)
        )
        self.y = self.y.sum(1)
        soft = (self.y / self.share.where(self.share > 0, 1).unsqueeze(1)).float()
        ignored = torch.full((ROWS,), -100)
        self.target = mk.MixedTarget(soft, ignored, self.share.float(), split, ROWS - split, 0.4)

    def loss(self, z, eta, rule=torch.abs, smoothing=0.0, sigmoid=False):
        """The definition, in z's dtype: sums over the samples of a row whose labels count."""
        y = (1 - smoothing) * self.y + smoothing / CLASSES * self.share.unsqueeze(1)
        if sigmoid:
            ce = self.share * torch.nn.functional.softplus(z).sum(1) - (y * z).sum(1)
            entropy = (torch.nn.functional.softplus(z) - z.sigmoid() * z).sum(1)
        else:
            log_p = z.log_softmax(1)
            ce, entropy = -(y * log_p).sum(1), -(log_p.exp() * log_p).sum(1)
        mix = ce[: self.target.num_mixed].sum() / self.share[: self.target.num_mixed].sum()
        counted = (self.share > 1 - 1e-9)[ROWS - self.target.num_reg :]
        reg = self.target.reg_weight * rule((entropy - ce)[ROWS - self.target.num_reg :][counted]).mean()
        total = mix + eta * reg
        return (mix / total).abs().detach() * total


def assert_like(case, loss, dtype=torch.float32, **options):
    """``loss`` of logits and target, and its gradient, are the definition's in float64 to within 4 times its error in dtype."""
    z = (3 * torch.randn(ROWS, CLASSES)).to(dtype).requires_grad_()
    value = loss(z, case.target)
    results = (value, *torch.autograd.grad(value, z))
    exact = z.detach().double().requires_grad_()
    expected = case.loss(exact, 2.0, **options)
    expected = (expected, *torch.autograd.grad(expected, exact))
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=8 * torch.finfo(dtype).eps)


FORMS = {
    "function": lambda z, target, **options: mk.mixupe_loss(z, target, eta=2.0, **options),
    "criterion": lambda z, target, **options: mk.MixupELoss(2.0, **options)(z, target),
    "linear": lambda z, target, **options: mk.linear_mixupe_loss(
        z, torch.eye(CLASSES, dtype=z.dtype), target, eta=2.0, chunk_rows=4, **options
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("penalty", RULES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_its_definition(form, penalty, smoothing, dtype, backend):
    options = {"penalty": penalty, "threshold": 0.3, "label_smoothing": smoothing}
    for case in (Case(), Case(whole=True)):
        assert_like(
            case,
            lambda z, target: FORMS[form](z, target, **options),
            dtype,
            rule=RULES[penalty],
            smoothing=smoothing,
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_sigmoid_models_loss(form, backend):
    assert_like(Case(), lambda z, target: FORMS[form](z, target, activation="sigmoid"), sigmoid=True)


def test_a_regularizer_on_mixed_rows():
    case = Case(ROWS)
    case.target = case.target._replace(num_reg=ROWS)
    assert_like(case, FORMS["function"])


def two_samples():
    """The same target of two samples a row, in either form."""
    own, partner, lam = torch.randint(CLASSES, (2, ROWS)).unbind() + (torch.rand(ROWS),)
    own[[0, 2, 9]], partner[[1, 2, 9]] = -100, -100
    partner[MIXED:], lam[MIXED:] = own[MIXED:], 1
    lam[3], partner[3] = 1, -100
    classes = mk.MixedTarget(own, partner, lam, MIXED, ROWS - MIXED, 0.4)
    case = Case()
    case.labels = torch.stack([own, partner], 1)
    share = ((own != -100) * lam + (partner != -100) * (1 - lam)).where(own != partner, (own != -100).float())
    soft = classes.dense(CLASSES) / share.where(share > 0, 1).unsqueeze(1)
    return classes, classes._replace(labels=soft, partner_labels=torch.full((ROWS,), -100), lam=share)


def test_two_samples_have_the_same_terms_in_either_form():
    classes, soft = two_samples()
    z = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    for options in ({}, {"label_smoothing": 0.3}):
        torch.testing.assert_close(soft.dense(CLASSES, **options), classes.dense(CLASSES, **options))
        weight = torch.rand(CLASSES)
        for ours, expected in zip(
            mk.ce_entropy(z, soft, **options, class_weight=weight),
            mk.ce_entropy(z, classes, **options, class_weight=weight),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    some = soft.lam > 0
    torch.testing.assert_close(mk.q_hat(z, soft)[some], mk.q_hat(z, classes)[some], rtol=1e-6, atol=1e-7)
    for eta in (0.0, 2.0):
        torch.testing.assert_close(
            mk.mixupe_loss(z, soft, eta=eta), mk.mixupe_loss(z, classes, eta=eta), rtol=1e-6, atol=1e-7
        )
    for ours, expected in zip(
        mk.mixed_accuracy(z, soft._replace(lam=torch.ones(ROWS))),
        mk.mixed_accuracy(z, soft._replace(lam=torch.ones(ROWS), partner_labels=soft.labels)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("policy", [{}, {"clean_fraction": 1 / 3}, {"regularize": "mixed"}])
def test_a_mixer_marks_what_is_ignored(per_sample, policy, backend):
    labels = torch.randint(CLASSES, (12,))
    labels[torch.rand(12) < 0.4] = -100
    x = torch.eye(12)  # a row of the batch is its weights
    fn = mk.MixupE(num_samples=TERMS, num_classes=CLASSES, per_sample=per_sample, **policy)
    rows, target = fn(x, labels)
    kept = labels != -100
    expected = rows.double() @ (one_hot(labels.where(kept, 0), CLASSES) * kept.unsqueeze(1)).double()
    torch.testing.assert_close(target.dense(CLASSES).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(target.lam.double(), expected.sum(1), rtol=0, atol=1e-6)
    whole = (rows * ~kept == 0).all(1)
    assert torch.equal(target.lam == 1, whole) and torch.equal(target.lam == 0, (rows * kept == 0).all(1))
    smooth = 0.9 * expected + 0.1 / CLASSES * expected.sum(1, keepdim=True)
    torch.testing.assert_close(target.dense(CLASSES, 0.1).double(), smooth, rtol=0, atol=1e-6)

    z = torch.randn(len(rows), CLASSES, dtype=torch.float64)
    log_p = z.log_softmax(1)
    ce, entropy = -(expected * log_p).sum(1), -(log_p.exp() * log_p).sum(1)
    criterion = mk.MixupELoss(0.5)
    criterion(z, target)
    mixed, first = target.num_mixed, len(rows) - target.num_reg
    torch.testing.assert_close(criterion.last.mix_loss, ce[:mixed].sum() / expected[:mixed].sum(), rtol=1e-5, atol=1e-6)
    q = (entropy - ce)[first:][whole[first:]]
    reg = target.reg_weight * q.abs().mean() if len(q) else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(criterion.last.reg, reg, rtol=1e-5, atol=1e-6)


def test_nothing_left_is_no_loss():
    fn = mk.MixupE(num_samples=TERMS, num_classes=CLASSES)
    _, target = fn(torch.randn(6, 2), torch.full((6,), -100))
    z = torch.randn(12, CLASSES)
    z[:, 0] = -torch.inf
    z.requires_grad_()
    loss = mk.mixupe_loss(z, target, eta=1.0, label_smoothing=0.1)
    loss.backward()
    assert loss.item() == 0 and not bool(z.grad.any())


def test_soft_labels_beside_classes_are_refused_unless_ignored():
    case, z = Case(), torch.randn(ROWS, CLASSES)
    for target, message in (
        (case.target._replace(partner_labels=torch.ones(ROWS, dtype=torch.int64)), r"partner_labels must be -100"),
        (case.target._replace(partner_labels=torch.full((3,), -100)), r"target.partner_labels must have shape \(14,\)"),
        (case.target._replace(partner_labels=torch.full((ROWS,), -100.5)), "partner_labels must be -100"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            mk.mixupe_loss(z, target, eta=1.0)
        if "14" not in message:
            with pytest.raises((TypeError, ValueError), match="partner_labels must"):
                target.dense(CLASSES)


def test_it_differentiates_in_lam_and_twice():
    case = Case()
    z = torch.randn(ROWS, CLASSES, dtype=torch.float64, requires_grad=True)
    lam = case.share.clone().clamp(0.05, 0.95).requires_grad_()
    target = case.target._replace(labels=case.target.labels.double())

    def ce(z, lam):
        return mk.ce_entropy(z, target._replace(lam=lam)).ce

    assert torch.autograd.gradcheck(ce, (z, lam), fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda z: mk.mixupe_loss(z, target, eta=0.5, rescale=False), (z,), fast_mode=True
    )
    jvp = torch.func.jvp(lambda z: mk.mixupe_loss(z, target, eta=0.5), (z.detach(),), (torch.ones_like(z),))[1]
    grad = torch.autograd.grad(mk.mixupe_loss(z, target, eta=0.5), z)[0]
    torch.testing.assert_close(jvp, grad.sum())


def test_under_vmap():
    case = Case()
    z = torch.randn(3, ROWS, CLASSES)
    labels, ignored, lam = (value.expand(3, *value.shape) for value in case.target[:3])

    def loss(z, labels, ignored, lam):
        return mk.mixupe_loss(z, mk.MixedTarget(labels, ignored, lam, *case.target[3:]), eta=0.5)

    expected = torch.stack([mk.mixupe_loss(row, case.target, eta=0.5) for row in z])
    torch.testing.assert_close(torch.func.vmap(loss)(z, labels, ignored, lam), expected)
