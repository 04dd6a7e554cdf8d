"""The drop-in criterion, and the losses that are expressions over ce_entropy."""

import copy

import pytest
import torch
import torch.nn.functional as F

import mixupe_kernels as mk
from mixupe_kernels.loss.options import LossOptions
from mixupe_kernels.ops import LossArguments

from .followed import followed


@pytest.fixture
def target():
    labels = torch.randint(5, (8,))
    return mk.MixedTarget(labels, labels.roll(1), torch.rand(8), 5, 3, 0.3)


def test_criterion_is_the_function(target):
    logits = torch.randn(8, 5)
    criterion = mk.MixupELoss(eta=0.4, penalty="threshold", threshold=0.2, label_smoothing=0.1)
    expected = mk.mixupe_loss(logits, target, eta=0.4, penalty="threshold", threshold=0.2, label_smoothing=0.1)
    assert torch.equal(criterion(logits, target), expected)


def test_last_holds_the_parts(target):
    logits = torch.randn(8, 5, requires_grad=True)
    criterion = mk.MixupELoss(eta=0.4)
    assert criterion.last is None
    loss = criterion(logits, target)
    mix_loss, clean_loss, reg, eta_hat = criterion.last
    torch.testing.assert_close(loss.detach(), eta_hat * (mix_loss + 0.4 * reg))
    torch.testing.assert_close(clean_loss, mk.ce_entropy(logits, target).ce[5:].mean().detach())
    torch.testing.assert_close(reg, 0.3 * mk.q_hat(logits, target)[-3:].abs().mean().detach())
    assert not any(part.requires_grad for part in criterion.last)


def test_eta_can_change_between_steps(target):
    logits = torch.randn(8, 5)
    criterion = mk.MixupELoss(eta=0.0)
    criterion(logits, target)
    criterion.eta = 0.8
    criterion(logits, target)
    assert torch.equal(criterion(logits, target), mk.MixupELoss(eta=0.8)(logits, target))
    with pytest.raises(ValueError, match="eta must be a number >= 0, got -1"):
        criterion.eta = -1
    assert criterion.eta == 0.8


def test_plain_targets_give_plain_cross_entropy():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    criterion = mk.MixupELoss(eta=0.4)
    torch.testing.assert_close(criterion(logits, labels), F.cross_entropy(logits, labels))
    soft = torch.rand(8, 5).softmax(1)
    torch.testing.assert_close(criterion(logits, soft), F.cross_entropy(logits, soft))


def test_eta_as_a_tensor(target):
    logits = torch.randn(8, 5)
    assert mk.mixupe_loss(logits, target, eta=torch.tensor(0.3)) == mk.mixupe_loss(logits, target, eta=0.3)


def test_criterion_copies_and_saves(target):
    criterion = mk.MixupELoss(eta=0.4)
    logits = torch.randn(8, 5)
    assert torch.equal(copy.deepcopy(criterion)(logits, target), criterion(logits, target))
    assert "eta=0.4" in repr(criterion)


def test_regmixup_is_cross_entropy_of_the_clean_rows(target):
    # RegMixup (Pinto et al., 2022): CE(mixed) + weight·CE(clean)
    logits = torch.randn(8, 5)
    ce = mk.ce_entropy(logits, target).ce
    loss = ce[: target.num_mixed].mean() + 0.7 * ce[-target.num_reg :].mean()
    dense = target.dense(5)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:5], dense[:5]) + 0.7 * F.cross_entropy(logits[5:], dense[5:])
    )


def test_confidence_penalty_and_z_loss():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    ce, entropy, lse = mk.ce_entropy(logits, labels)
    p = logits.softmax(1)
    torch.testing.assert_close(
        (ce - 0.1 * entropy).mean(), F.cross_entropy(logits, labels) + 0.1 * (p * p.log()).sum(1).mean()
    )
    torch.testing.assert_close(1e-4 * lse.square().mean(), 1e-4 * logits.logsumexp(1).square().mean())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"eta": -0.1}, ValueError, "eta must be a number >= 0, got -0.1"),
        ({"eta": float("nan")}, ValueError, "eta must be a number >= 0, got nan"),
        ({"eta": "big"}, TypeError, "eta must be a number >= 0, got str 'big'"),
        ({"clean_weight": -1}, ValueError, "clean_weight must be a number >= 0, got -1"),
        ({"clean_weight": torch.tensor(0.1)}, TypeError, "clean_weight must be a number >= 0, got Tensor"),
        (
            {"penalty": "square"},
            ValueError,
            "penalty must be one of 'abs', 'threshold', 'linear_detached', got 'square'",
        ),
        ({"activation": "relu"}, ValueError, "activation must be one of 'softmax', 'sigmoid', got 'relu'"),
        ({"label_smoothing": 2}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 2"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number, got nan"),
    ],
)
def test_options_are_checked(target, options, error, message):
    with pytest.raises(error, match=message):
        mk.MixupELoss(**options)
    with pytest.raises(error, match=message):
        mk.mixupe_loss(torch.randn(8, 5), target, **{"eta": 0.1, **options})


def test_sigmoid_refuses_class_indices(target):
    with pytest.raises(TypeError, match="target must be floating point"):
        mk.mixupe_loss(torch.randn(8, 5), target, eta=0.1, activation="sigmoid")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"lam": torch.ones(7)}, ValueError, r"target.lam must have shape \(8,\), got \(7,\)"),
        ({"partner_labels": torch.zeros(7, dtype=torch.int64)}, ValueError, "target.partner_labels must have shape"),
        ({"labels": torch.full((8,), 5)}, ValueError, r"target.labels must be a class in \[0, 4\], got 5"),
        ({"lam": [1.0] * 8}, TypeError, "target.lam must be a torch.Tensor, got list"),
        ({"lam": torch.ones(1)}, ValueError, r"target.lam must have shape \(8,\), got \(1,\)"),
        ({"partner_labels": None}, TypeError, "target.partner_labels must be a torch.Tensor, got NoneType"),
        ({"partner_labels": torch.zeros(8)}, TypeError, "target.partner_labels must have dtype int64, got float32"),
        ({"labels": torch.zeros(8, dtype=torch.int32)}, TypeError, "target.labels must have dtype int64, got int32"),
        ({"lam": torch.ones(8, device="meta")}, ValueError, "target.lam must be on the device of logits, cpu, got meta"),
        ({"num_mixed": 9}, ValueError, r"target.num_mixed must be in \[0, 8\], got 9"),
        ({"num_reg": True}, TypeError, "target.num_reg must be an int, got bool True"),
        ({"reg_weight": -1.0}, ValueError, "target.reg_weight must be a number >= 0, got -1"),
        ({"reg_weight": torch.ones(1)}, ValueError, r"target.reg_weight must have shape \(\), got \(1,\)"),
        ({"reg_weight": torch.ones((), requires_grad=True)}, ValueError, "target.reg_weight must not require a gradient"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.refuses
def test_targets_are_checked(backend, target, change, error, message, wants_gradient):
    logits = torch.randn(8, 5, requires_grad=wants_gradient)
    target = target._replace(reg_weight=torch.tensor(0.3))
    with pytest.raises(error, match=message):
        mk.mixupe_loss(logits, target._replace(**change), eta=0.1)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_targets_are_converted(backend, target, wants_gradient):
    logits = torch.randn(8, 5, requires_grad=wants_gradient)
    target = target._replace(reg_weight=torch.tensor(0.3))
    expected = mk.mixupe_loss(logits, target, eta=0.1)
    for change in ({"lam": target.lam.double()}, {"reg_weight": target.reg_weight.double()}, {"reg_weight": 0.3}):
        assert torch.equal(mk.mixupe_loss(logits, target._replace(**change), eta=0.1), expected)
    dense = target._replace(
        labels=F.one_hot(target.labels, 5).float(), partner_labels=F.one_hot(target.partner_labels, 5)
    )
    torch.testing.assert_close(mk.mixupe_loss(logits, dense, eta=0.1), expected)


def loss_of(logits, target):
    return mk.mixupe_loss(logits, target, eta=0.5)


def test_a_gradient_made_in_the_forward_is_scaled_and_kept(target):
    logits = torch.randn(8, 5, requires_grad=True)
    loss = loss_of(logits, target)
    once = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    (expected,) = torch.autograd.grad(loss_of(logits.double(), target), logits)
    torch.testing.assert_close(once, expected)
    assert "WithGradient" in loss.grad_fn.name()
    for factor in (1, 3, 1, 3):
        (factor * loss).backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 9 * once)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], once)


def test_gradients_for_many_upstream_gradients_at_once(target):
    logits = torch.randn(8, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(logits, target), logits)
    factors = torch.tensor([1.0, -2.0])
    (batched,) = torch.autograd.grad(loss_of(logits, target), logits, factors, is_grads_batched=True)
    torch.testing.assert_close(batched, factors.view(2, 1, 1) * gradient)


@pytest.mark.parametrize(
    "shape, dtype", [((4, 3), torch.float16), ((5, 2**20), torch.float32)], ids=["float16", "beyond the cache"]
)
def test_a_gradient_made_in_the_backward(shape, dtype):
    labels = torch.arange(shape[0]) % 3
    target = mk.MixedTarget(labels, labels.flip(0), torch.full((shape[0],), 0.3), 2, shape[0] - 2, 0.25)
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    assert "WithGradient" not in loss_of(logits, target).grad_fn.name()
    (gradient,) = torch.autograd.grad(512 * loss_of(logits, target), logits)
    (expected,) = torch.autograd.grad(512 * loss_of(logits.double(), target), logits)
    torch.testing.assert_close(gradient, expected)


def test_inplace_backward_writes_over_the_logits(target):
    weight = torch.randn(5, 5, requires_grad=True)
    x = torch.randn(8, 5)
    expected_logits = x @ weight
    (expected,) = torch.autograd.grad(mk.mixupe_loss(expected_logits, target, eta=0.3), weight)
    logits = x @ weight
    loss = mk.MixupELoss(eta=0.3, inplace_backward=True)(logits, target)
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    expected_dz = torch.autograd.grad(mk.mixupe_loss(expected_logits, target, eta=0.3), expected_logits)[0]
    torch.testing.assert_close(logits, expected_dz)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_is_refused_where_it_would_be_wrong(target):
    leaf = torch.randn(8, 5, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_backward must be False for logits that are a leaf"):
        mk.mixupe_loss(leaf, target, eta=0.3, inplace_backward=True)
    with pytest.raises(ValueError, match="inplace_backward must be False for logits that are not"):
        mk.mixupe_loss((leaf * 2).t().contiguous().t(), target, eta=0.3, inplace_backward=True)
    with pytest.raises(ValueError, match="inplace_backward must be False with a penalty that is a function"):
        mk.mixupe_loss(leaf * 2, target, eta=0.3, inplace_backward=True, penalty=torch.abs)
    loss = mk.mixupe_loss(leaf * 2, target, eta=0.3, inplace_backward=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    saved = leaf.exp()  # exp keeps its output for its own backward
    loss = mk.mixupe_loss(saved, target, eta=0.3, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_learned_target_does_not_change_the_gradient_in_the_logits(backend, activation):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(6, 5, dtype=torch.float64)  # do not sum to 1

    def gradient(labels, penalty):
        target = mk.MixedTarget(labels, labels.flip(0), torch.full((6,), 0.3, dtype=torch.float64), 4, 3, 0.4)
        loss = mk.mixupe_loss(logits, target, eta=0.5, penalty=penalty, activation=activation)
        return torch.autograd.grad(loss, logits)[0]

    for penalty in ("abs", "threshold", "linear_detached"):
        fixed = gradient(labels, penalty)
        torch.testing.assert_close(gradient(labels.clone().requires_grad_(), penalty), fixed)


@pytest.mark.parametrize("kind", ["small", "soft", "large"])
def test_a_loss_is_few_calls_in_few_files(kind):
    """What a reader follows from the criterion to the operator and back, whichever way it goes."""
    rows, classes = (44, 100_000) if kind == "large" else (128, 10)  # above 16 MiB the gradient is made in the backward
    labels = torch.randint(classes, (rows,))
    if kind == "soft":
        labels = F.one_hot(labels, classes).float()
    half = rows // 2
    target = mk.MixedTarget(labels, labels.flip(0), torch.rand(rows), half, half, torch.tensor(0.3))
    logits = torch.randn(rows, classes, requires_grad=True)
    criterion = mk.MixupELoss(0.1)
    criterion(logits, target)  # η's tensor is made once
    calls = followed(lambda: criterion(logits, target).backward())
    # An earlier test's use_backend has left its switches in the dispatcher.
    calls = [(file, name) for file, name in calls if file != "ops/backends.py"]
    assert len(calls) <= 15 and len({file for file, _ in calls}) <= 5, calls


def test_options_end_the_arguments_of_the_operator_in_their_order():
    assert LossArguments._fields[-len(LossOptions._fields) :] == LossOptions._fields
