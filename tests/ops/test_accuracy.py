"""Where sums cancel, round or overflow: errors against PyTorch's own operators in the same dtype, values by formulas."""

import pytest
import torch
import torch.nn.functional as F

from ..cases import assert_accurate, check, compute, make_target, thorough, truth

ops = torch.ops.mixupe


def assert_as_accurate_as_torchs(actual, function, *inputs):
    """At most 4 times the error of ``function``, a composition of PyTorch's operators, plus an ulp."""
    assert_accurate(actual, function(*(x.double() for x in inputs)), function(*inputs), ulps=1)


@pytest.mark.parametrize("classes", [4097, *thorough(16385, 100003)])
def test_smoothed_cross_entropy_of_equal_logits(backend, classes):
    logits, labels = torch.full((2, classes), 1.5), torch.tensor([3, 5])

    def torchs(z):
        return F.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)

    assert_as_accurate_as_torchs(ops.ce_entropy(logits, labels, None, None, None, 0.1)[0], torchs, logits)
    options = (labels, labels, torch.ones(2), None, 0.1)
    assert_as_accurate_as_torchs(ops.ce_entropy(logits, *options)[0], torchs, logits)


def repeated(rows, classes, scale):
    """Rows enough that the worst of them tells: of one row, PyTorch's error may happen to be nothing."""
    return torch.randn(rows, classes) * scale


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("classes", [100, 2049, *thorough(4097, 20001)])
def test_dense_targets(backend, classes, scale):
    logits, y = repeated(16, classes, scale), torch.rand(16, classes).softmax(1)
    ce, *_ = ops.ce_entropy(logits, y)
    assert_as_accurate_as_torchs(ce, lambda z, y: F.cross_entropy(z, y, reduction="none"), logits, y)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("classes", [100, 2049, *thorough(4097, 20001)])
def test_sums_of_many_sigmoids(backend, classes, scale):
    logits, y = repeated(16, classes, scale), torch.rand(16, classes)
    bce, *_ = ops.ce_entropy(logits, y, None, None, None, 0.0, -100, True)

    def torchs(z, y):
        return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)

    assert_as_accurate_as_torchs(bce, torchs, logits, y)


SIGMOID_TARGETS = {
    "dense": (torch.tensor([[1.0, 0.5, 0.5]]), None, None),
    "index": (torch.tensor([0]), None, None),
    "mixed": (torch.tensor([0]), torch.tensor([0]), torch.tensor([0.3])),
}


@pytest.mark.parametrize("kind", SIGMOID_TARGETS)
def test_sigmoid_terms_are_summed_one_by_one(backend, kind):
    """softplus(1e8) - 1e8 is 0, whatever else is in the row."""
    logits = torch.tensor([[1e8, 5, -5]])
    target = [None if t is None else t.to(logits.device) for t in SIGMOID_TARGETS[kind]]
    ce, *_ = ops.ce_entropy(logits, *target, None, 0.0, -100, True)
    torch.testing.assert_close(ce, torch.tensor([5.0134304]))
    eta = torch.tensor(0.0)
    loss, *_ = ops.mixupe_loss(logits, *target, eta, eta, 1, 0, 0, 1.0, False, 0.0, True)
    torch.testing.assert_close(loss, torch.tensor(5.0134304))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of ∞ - ∞
@pytest.mark.parametrize("chosen", [(0, 1, 2), (0, 1), (0,), (1,)])
@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf])
def test_an_infinite_logit_of_a_sigmoid_spoils_nothing_else(backend, infinite, chosen):
    logits, target = torch.randn(3, 5), (torch.rand(3, 5), None, None)
    logits[1, 2] = infinite
    options = (*target, None, 0.0, -100, True)
    saved = compute("ce_entropy", logits, *options)[1:]
    upstream = torch.randn(3, 3)
    dz = check(
        "ce_entropy_backward", *(upstream[i] if i in chosen else None for i in range(3)), logits, *saved, *options
    )
    assert dz.actual.isfinite().all()


@pytest.mark.parametrize("shift", [-1e4, 30.0, 1e4])
@pytest.mark.parametrize("classes", [10, 1001, *thorough(9001)])
@pytest.mark.parametrize("kind", ["index", "mixed", "dense"])
def test_gradients_of_logits_that_share_a_shift(backend, kind, classes, shift):
    """p = e^(z - lse) with lse rounded would be off by half an ulp of the shift: 4.8e-4 at 1e4."""
    logits, target = torch.randn(6, classes) + shift, make_target(kind, (6, classes), torch.float32)
    upstream = torch.randn(2, 6)

    def torchs(z):
        """The gradient by autograd, of log_softmax."""
        z = z.detach().requires_grad_()
        y = target[0].to(z)
        if kind != "dense":
            labels, partner_labels, lam = target
            y = F.one_hot(labels, classes).to(z)
            if partner_labels is not None:
                y = lam.to(z)[:, None] * y + (1 - lam.to(z)[:, None]) * F.one_hot(partner_labels, classes)
        log_p = z.log_softmax(1)
        ce, entropy = -(y * log_p).sum(1), -(log_p.exp() * log_p).sum(1)
        return torch.autograd.grad((ce, entropy), z, tuple(upstream.to(z)))[0]

    _, entropy, lse = ops.ce_entropy(logits, *target)
    dz = ops.ce_entropy_backward(*upstream, None, logits, entropy, lse, *target)
    assert_accurate(dz, torchs(logits.double()), torchs(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [-3.0, 3.0, 7.0, 11.0], ids="lead {}".format)
def test_gradients_up_to_where_lse_is_exact(backend, dtype, lead):
    """p is off by half an ulp of lse, which the backward takes as it is up to 8, or 32 in 16 bits (csrc/row.h): the more a
    label leads its row, the smaller the gradient beside that."""
    largest = 8 if dtype is torch.float32 else 32
    logits, labels = torch.randn(128, 64), torch.zeros(128, dtype=torch.int64)
    logits[:, 0] += lead
    logits += largest * (1 - torch.rand(128, 1) / 2) - logits.logsumexp(1, keepdim=True)
    logits = logits.to(dtype)

    def torchs(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum"), z)[0]

    _, entropy, lse = ops.ce_entropy(logits, labels)
    dz = ops.ce_entropy_backward(torch.ones(128), None, None, logits, entropy, lse, labels)
    assert_accurate(dz, torchs(logits.double()), torchs(logits))


@pytest.mark.parametrize("kind", ["index", "mixed", "dense"])
def test_gradients_of_a_loss_whose_logits_share_a_shift(backend, kind):
    logits, target = torch.randn(6, 40) + 1e4, make_target(kind, (6, 40), torch.float32)
    eta = torch.tensor(0.3)
    # Not rescaled: η̂ has q̂ in it, whose (Σy - 1)·lse is as far off as any float32 (y - p)ᵀz is here.
    arguments = (logits, *target, eta, eta, 3, 3, 0, 1.0, False)
    _, parts, *rows = compute("mixupe_loss", *arguments)
    exact = truth("mixupe_loss_backward", torch.ones(()), logits, *target, *(part[1] for part in (parts, *rows)), 3)
    *_, gradient = ops.mixupe_loss_with_gradient(*arguments)
    assert_accurate(gradient, exact, exact.float(), ulps=8)
    gradient = ops.mixupe_loss_backward(torch.ones(()), logits, *target, parts.actual, *(row.actual for row in rows), 3)
    assert_accurate(gradient, exact, exact.float(), ulps=8)


@pytest.mark.parametrize("kind", ["index", "mixed", "dense"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_a_row_of_neither_mean_has_no_gradient(backend, kind, sigmoid):
    """η̂ is NaN if a loss is; slicing would give the other rows a gradient of 0."""
    logits, target = torch.randn(6, 5), make_target(kind, (6, 5), torch.float32)
    logits[0, 1] = torch.nan
    eta = torch.tensor(0.3)
    arguments = (logits, *target, eta, eta, 2, 2, 0, 1.0, True, 0.0, sigmoid)
    loss, parts, *rows = ops.mixupe_loss(*arguments)
    assert loss.isnan() and parts[3].isnan()
    *_, gradient = ops.mixupe_loss_with_gradient(*arguments)
    again = ops.mixupe_loss_backward(torch.ones(()), logits, *target, parts, *rows, 2, 0, 0.0, sigmoid)
    for dz in (gradient, again):
        assert torch.equal(dz[2:4], torch.zeros(2, 5)) and dz[:2].isnan().all()
