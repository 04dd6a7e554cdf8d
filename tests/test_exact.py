"""The accurate q: against the double-backward formulation, and the authors' four versions written out."""

import pytest
import torch
from torch import nn

import mixupe_kernels as mk


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class PlainBatchNorm(nn.BatchNorm2d):
    """The formula: the built-in batch norm's higher derivatives in train mode are not all right (torch 2.13)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean = x.mean((0, 2, 3), keepdim=True)
        deviation = torch.sqrt((x - mean).square().mean((0, 2, 3), keepdim=True) + self.eps)
        return (x - mean) / deviation * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def convnet(norm=nn.BatchNorm2d):
    layers = (nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*layers).double()


def by_double_backward(model, x, y, x_mean, detach_residual):
    """q_i = ⟨∂/∂x_i of Σ_j r_jᵀ f(x)_j, E[x'] - x_i⟩ with the residual r = p - y put back after the derivative."""
    x = x.clone().requires_grad_()
    logits = model(x)
    residual = logits.softmax(1) - y
    # The derivative must not see r: differentiate at a constant, and multiply by r through a dummy linear in it.
    dummy = torch.zeros_like(logits, requires_grad=True)
    (vjp,) = torch.autograd.grad((logits * dummy).sum(), x, create_graph=True)
    directional = (vjp * (x_mean - x)).flatten(1).sum(1)
    (jvp,) = torch.autograd.grad(directional.sum(), dummy, create_graph=True)
    return ((residual.detach() if detach_residual else residual) * jvp).sum(1)


@pytest.mark.parametrize("detach_residual", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("build, size", [(mlp, (4,)), (convnet, (1, 6, 6))])
def test_equals_double_backward(build, size, train, detach_residual):
    model, plain = build().train(train), build().train(train)
    if build is convnet:
        plain = convnet(PlainBatchNorm).train(train)
    plain.load_state_dict(model.state_dict())
    x, x_mean = torch.randn(5, *size, dtype=torch.double), torch.randn(size, dtype=torch.double)
    labels = torch.randint(3, (5,))
    y = nn.functional.one_hot(labels, 3).double()
    expected = by_double_backward(plain, x, y, x_mean, detach_residual)
    actual = mk.exact_q(model, x, labels, x_mean, detach_residual=detach_residual)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(mk.exact_q(model, x, y, x_mean, detach_residual=detach_residual), expected)
    upstream = torch.randn(5, dtype=torch.double)
    gradients = (
        torch.autograd.grad(q, list(net.parameters()), upstream, allow_unused=True)
        for q, net in ((actual, model), (expected, plain))
    )
    for ours, theirs in zip(*gradients, strict=True):
        ours = torch.zeros(()).double() if ours is None else ours
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours.expand_as(theirs), theirs)


def test_batch_norm_statistics_move_once():
    model = convnet().train()
    twin = convnet().train()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 1, 6, 6, dtype=torch.double)
    mk.exact_q(model, x, torch.zeros(5, dtype=torch.int64), torch.zeros(1, 6, 6).double())
    twin(x)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_stands_beside_another_forward_pass():
    model = convnet().train()
    x, labels = torch.randn(5, 1, 6, 6, dtype=torch.double), torch.randint(3, (5,))
    target = mk.MixedTarget(labels, labels.flip(0), torch.full((5,), 0.4), 5, 5, 0.3)
    logits = model(0.4 * x + 0.6 * x.flip(0))
    q = mk.exact_q(model, x, labels, torch.zeros(1, 6, 6).double())
    mk.MixupELoss(eta=0.5)(logits, target, q=q).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradients_in_train_mode_are_numerically_right():
    model = convnet().train()
    x, x_mean = torch.randn(4, 1, 5, 5, dtype=torch.double), torch.zeros(1, 5, 5, dtype=torch.double)
    labels = torch.randint(3, (4,))

    def of_weight(weight):
        def f(inputs):
            return torch.func.functional_call(model, {"0.weight": weight}, (inputs,))

        return mk.exact_q(f, x, labels, x_mean)

    assert torch.autograd.gradcheck(of_weight, (model[0].weight.detach().clone().requires_grad_(),))


def authors_loss(version, model, x_mixed, y_mixed, x, y, x_mean, eta, weight, t=1.0):
    """The four versions of the authors' public code, from their formulas: mixup's loss and the regularizer apart, joined
    by the detached rescaling."""
    mix_loss = -(y_mixed * model(x_mixed).log_softmax(1)).sum(1).mean()
    logits = model(x)
    residual = y - logits.softmax(1)
    if version in (1, 2):
        q = by_double_backward(model, x, y, x_mean, detach_residual=True)
        reg = weight * ((q * (q < t)).mean() if version == 1 else q.abs().mean())
    elif version == 3:
        q_hat = (residual * logits).sum(1)
        reg = -weight * (q_hat * (q_hat < t)).mean()
    else:
        reg = -weight * (residual.detach() * logits).sum(1).mean()
    total = mix_loss + eta * reg
    return total * (mix_loss.abs() / total.abs()).detach()


def below_one(q):
    return q * (q < 1)


@pytest.mark.parametrize("version, penalty", [(1, below_one), (2, "abs"), (3, "threshold"), (4, "linear_detached")])
def test_the_authors_four_versions(version, penalty):
    model = mlp()
    x, x_mean = torch.randn(6, 4, dtype=torch.double), torch.randn(4, dtype=torch.double)
    labels, partner, lam = torch.randint(3, (6,)), torch.randperm(6), 0.3
    y = nn.functional.one_hot(labels, 3).double()
    x_mixed, y_mixed = (lam * a + (1 - lam) * a[partner] for a in (x, y))
    weight = mk.expected_a_lambda(0.7)
    expected = authors_loss(version, model, x_mixed, y_mixed, x, y, x_mean, 0.5, weight)
    lams = torch.full((6,), lam, dtype=torch.double)
    criterion = mk.MixupELoss(eta=0.5, penalty=penalty, threshold=1.0)
    if version in (1, 2):
        target = mk.MixedTarget(labels, labels[partner], lams, 6, 6, weight)
        actual = criterion(model(x_mixed), target, q=mk.exact_q(model, x, labels, x_mean, detach_residual=True))
    else:
        own, other = torch.cat([labels, labels]), torch.cat([labels[partner], labels])
        target = mk.MixedTarget(own, other, torch.cat([lams, torch.ones(6).double()]), 6, 6, weight)
        actual = criterion(model(torch.cat([x_mixed, x])), target)
    torch.testing.assert_close(actual, expected)
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def by_backward_of_the_whole_batch(model, x, y, x_mean):
    """Version 2's q as the authors write it: ⟨∂/∂x_i of Σ_j r_jᵀ f(x)_j, E[x'] - x_i⟩ with r = p - y a constant."""
    x = x.clone().requires_grad_()
    logits = model(x)
    residual = (logits.softmax(1) - y).detach()
    (gradient,) = torch.autograd.grad((residual * logits).sum(), x)
    return (gradient * (x_mean - x.detach())).flatten(1).sum(1)


@pytest.mark.parametrize("train", [False, True])
def test_version_2_is_another_where_rows_are_coupled(train):
    """BatchNorm in train mode: a row's input moves the logits of all. The sums over the batch are equal, the rows are not."""
    model = convnet(PlainBatchNorm).train(train)
    x, x_mean = torch.randn(5, 1, 6, 6, dtype=torch.double), torch.randn(1, 6, 6, dtype=torch.double)
    labels = torch.randint(3, (5,))
    authors = by_backward_of_the_whole_batch(model, x, nn.functional.one_hot(labels, 3).double(), x_mean)
    ours = mk.exact_q(model, x, labels, x_mean, detach_residual=True).detach()
    torch.testing.assert_close(ours.sum(), authors.sum())
    if train:
        assert (ours - authors).abs().max() > 0.01 * authors.abs().max()
        assert (ours.abs().mean() - authors.abs().mean()).abs() > 1e-3 * authors.abs().mean()
    else:
        torch.testing.assert_close(ours, authors)


def test_input_mean():
    assert mk.batch_mean is mk.input_mean
    data = torch.randn(25, 3, 2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data, torch.zeros(25)), batch_size=4)
    torch.testing.assert_close(mk.input_mean(loader), data.mean(0))
    torch.testing.assert_close(mk.input_mean([data[:3], data[3:]], progress=False), data.mean(0))
    with pytest.raises(ValueError, match="loader must yield at least one sample"):
        mk.input_mean([])
    with pytest.raises(TypeError, match="each batch of loader must be a torch.Tensor, got str"):
        mk.input_mean(["a"])


def test_an_ignored_row_has_no_q():
    model, x, x_mean = mlp(), torch.randn(4, 4, dtype=torch.double), torch.zeros(4)
    labels = torch.tensor([0, -100, 2, -100])
    q = mk.exact_q(model, x, labels, x_mean)
    expected = mk.exact_q(model, x[::2], labels[::2], x_mean)
    torch.testing.assert_close(q, torch.stack([expected[0], q.new_zeros(()), expected[1], q.new_zeros(())]))
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(value.square().sum(), parameters, allow_unused=True) for value in (q, expected))
    for ours, theirs in zip(*gradients, strict=True):
        if ours is not theirs:  # None: the last bias
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "labels", [torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int64), torch.zeros(5), [0]]
)
def test_statistics_stay_where_labels_are_refused(labels):
    model = convnet().train()
    before = [buffer.clone() for buffer in model.buffers()]
    x = torch.randn(5, 1, 6, 6, dtype=torch.double)
    with pytest.raises((TypeError, ValueError), match="labels must"):
        mk.exact_q(model, x, labels, torch.zeros(1, 6, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a batch dimension"),
        ({"x_mean": torch.zeros(4, dtype=torch.complex64)}, TypeError, "x_mean must be real"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 1])}, ValueError, r"labels must be a class in \[0, 2\], got 3"),
        ({"labels": torch.rand(6, 4)}, ValueError, r"labels must have shape \(6, 3\), got \(6, 4\)"),
        ({"x_mean": torch.zeros(3)}, ValueError, r"x_mean must broadcast to \(4,\), got \(3,\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must have shape \(6,\), got \(5,\)"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, TypeError, "labels must have dtype int64, got int32"),
        ({"x": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "x must have dtype"),
    ],
)
def test_exact_q_refuses(change, error, message):
    arguments = {"x": torch.randn(6, 4), "labels": torch.zeros(6, dtype=torch.int64), "x_mean": torch.zeros(4)}
    with pytest.raises(error, match=message):
        mk.exact_q(mlp().float(), **{**arguments, **change})


def test_a_model_of_another_output_is_refused():
    x, labels = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    for model, error in (
        (lambda x: [x], TypeError),
        (lambda x: x.unsqueeze(0), ValueError),
        (lambda x: x[1:], ValueError),
    ):
        with pytest.raises(error, match="the output of model must"):
            mk.exact_q(model, x, labels, torch.zeros(4))
