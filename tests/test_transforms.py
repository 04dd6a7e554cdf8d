"""torch.func over the public functions, against plain autograd or a loop; forward mode is refused."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import mixupe_kernels as mk
from mixupe_kernels import conventions

ROWS, CLASSES, MEMBERS = 6, 5, 3
# What vmap says of a loop.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture
def target():
    labels = torch.randint(CLASSES, (ROWS,))
    lam = torch.rand(ROWS, dtype=torch.float64)
    return mk.MixedTarget(labels, labels.flip(0), lam, 4, 3, torch.tensor(0.4, dtype=torch.float64))


@pytest.fixture
def logits():
    return torch.randn(ROWS, CLASSES, dtype=torch.float64)


def losses(target):
    """Each loss as a function of the logits: fused, with the caller's own penalty, and made of the rows' values."""
    criterion = mk.MixupELoss(0.5)

    def of_rows(z):
        ce, entropy, lse = mk.ce_entropy(z, target)
        return (ce + 0.3 * entropy**2 - lse).mean()

    return {
        "mixupe_loss": lambda z: mk.mixupe_loss(z, target, eta=0.5),
        "criterion": lambda z: criterion(z, target),
        "threshold": lambda z: mk.mixupe_loss(z, target, eta=0.5, penalty="threshold"),
        "own penalty": lambda z: mk.mixupe_loss(z, target, eta=0.5, penalty=torch.square),
        "q_hat": lambda z: mk.q_hat(z, target).square().mean(),
        "ce_entropy": of_rows,
    }


NAMES = ("mixupe_loss", "criterion", "threshold", "own penalty", "q_hat", "ce_entropy")


def by_autograd(loss, logits):
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    return gradient


@pytest.mark.parametrize("name", NAMES)
def test_grad_is_that_of_autograd(backend, name, logits, target):
    loss = losses(target)[name]
    torch.testing.assert_close(grad(loss)(logits), by_autograd(loss, logits))
    torch.testing.assert_close(loss(logits), loss(logits.requires_grad_()))  # nothing of the transform is left behind


@pytest.mark.parametrize("name", NAMES)
def test_hessian_is_that_of_autograd(backend, name, logits, target):
    loss = losses(target)[name]
    expected = torch.autograd.functional.hessian(loss, logits)
    torch.testing.assert_close(jacrev(grad(loss))(logits), expected)
    v = torch.randn_like(logits)
    product = grad(lambda z: (grad(loss)(z) * v).sum())(logits)
    torch.testing.assert_close(product, torch.einsum("ijkl,ij->kl", expected, v))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(backend, name, logits, target):
    loss = losses(target)[name]
    with pytest.raises(NotImplementedError, match="forward mode .* use reverse mode"):
        jvp(loss, (logits,), (logits,))
    with pytest.raises(NotImplementedError, match="forward mode"):
        hessian(loss)(logits)  # forward over reverse
    for z in (logits, logits.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
            loss(forward_ad.make_dual(z, logits))


def test_forward_mode_is_refused_in_lam_and_in_mix(backend, logits, target):
    with pytest.raises(NotImplementedError, match="forward mode"):
        jvp(lambda lam: mk.mixupe_loss(logits, target._replace(lam=lam), eta=0.5), (target.lam,), (target.lam,))
    with pytest.raises(NotImplementedError, match="mixupe::mix has"):
        jvp(lambda lam: mk.mix(logits, "flip", lam), (target.lam,), (torch.ones_like(target.lam),))
    with pytest.raises(ValueError, match="x must not require a gradient with out"):
        jvp(lambda x: mk.mix(x, "flip", 0.3, out=torch.empty_like(x)), (logits,), (logits,))


def test_forward_mode_through_the_upstream_gradient(logits, target):
    z = logits.requires_grad_()
    loss = mk.mixupe_loss(z, target, eta=0.5)
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2))
        dual = forward_ad.unpack_dual(torch.autograd.grad(loss, z, upstream)[0])
    torch.testing.assert_close((dual.primal, dual.tangent), (gradient, 2 * gradient))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("penalty", ["abs", "threshold", "linear_detached"])
def test_mixed_derivatives_in_logits_and_target(backend, activation, lam, penalty, logits):
    """Where an outer transform differentiates in λ or soft labels, which the inner one takes for constants."""
    lam = torch.full((ROWS,), lam, dtype=torch.float64)
    labels = torch.nn.functional.one_hot(torch.randint(CLASSES, (ROWS,)), CLASSES).double()
    v = torch.randn_like(logits)

    def loss(z, labels, lam):
        target = mk.MixedTarget(labels, labels.flip(0), lam, 4, 3, 0.4)
        return mk.mixupe_loss(z, target, eta=0.5, penalty=penalty, activation=activation)

    def along(labels, lam):
        return (grad(loss)(logits, labels, lam) * v).sum()

    inputs = [labels.clone().requires_grad_(), lam.clone().requires_grad_()]
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, *inputs), z, create_graph=True)
    expected = torch.autograd.grad((gradient * v).sum(), inputs)
    torch.testing.assert_close(grad(along, argnums=(0, 1))(labels, lam), expected)


def test_inplace_backward_is_refused(logits, target):
    with pytest.raises(ValueError, match="inplace_backward must be False under a transform"):
        grad(lambda z: mk.mixupe_loss(z * 1, target, eta=0.5, inplace_backward=True))(logits)


def test_a_criterion_keeps_nothing_of_a_transform(logits, target):
    criterion = mk.MixupELoss(0.5)
    target = target._replace(reg_weight=0.3)  # a number, of which a constant is made
    vmap(grad(lambda z: criterion(z, target)))(logits.unsqueeze(0))
    assert criterion.last is None
    loss = criterion(logits, target)
    assert criterion.last.mix_loss > 0
    torch.testing.assert_close(loss, mk.mixupe_loss(logits, target, eta=0.5))
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    assert not any(wrapped(tensor) for tensor in [*criterion._eta.values(), *conventions._tensors.values()])


@pytest.mark.parametrize("name", NAMES)
def test_vmap_and_grad_go_together(backend, name, target):
    loss = losses(target)[name]
    logits = torch.randn(MEMBERS, ROWS, CLASSES, dtype=torch.float64)
    expected = torch.stack([by_autograd(loss, z) for z in logits])
    torch.testing.assert_close(vmap(loss)(logits), torch.stack([loss(z) for z in logits]))
    torch.testing.assert_close(vmap(grad(loss))(logits), expected)
    torch.testing.assert_close(grad(lambda z: vmap(loss)(z).sum())(logits), expected)
    z = logits.clone().requires_grad_()
    vmap(loss)(z).sum().backward()
    torch.testing.assert_close(z.grad, expected)


def test_an_ensemble_trains_under_vmap(target):
    models = [torch.nn.Linear(4, CLASSES).double() for _ in range(MEMBERS)]
    parameters, _ = stack_module_state(models)
    x = torch.randn(ROWS, 4, dtype=torch.float64)

    def loss(parameters):
        return mk.mixupe_loss(functional_call(models[0], parameters, (x,)), target, eta=0.5)

    gradients = vmap(grad(loss))(parameters)
    for member, model in enumerate(models):
        mk.mixupe_loss(model(x), target, eta=0.5).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][member], parameter.grad)


@pytest.mark.parametrize("partner", ["flip", "permutation", "two"])
def test_derivatives_of_mix(backend, partner):
    x, lam = torch.randn(ROWS, 2, 3, dtype=torch.float64), torch.rand(ROWS, dtype=torch.float64)
    if partner == "permutation":
        partner = torch.randperm(ROWS)
    elif partner == "two":
        partner, lam = torch.randint(ROWS, (ROWS, 2)), torch.rand(ROWS, 2, dtype=torch.float64)

    def value(x, lam):
        return mk.mix(x, partner, lam).pow(3).sum()

    inputs = [x.clone().requires_grad_(), lam.clone().requires_grad_()]
    expected = torch.autograd.grad(value(*inputs), inputs)
    torch.testing.assert_close(grad(value, argnums=(0, 1))(x, lam), expected)
