"""torch.func and forward mode over the public functions, against plain autograd, a loop, or finite differences."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import mixupe_kernels as mk
from mixupe_kernels import conventions

ROWS, CLASSES, MEMBERS = 6, 5, 3
# What vmap says of an operator without a rule.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


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
    eye = torch.eye(CLASSES, dtype=torch.float64)
    # One-hot, so that labels are exactly 0 or 1.
    soft = target._replace(labels=eye[target.labels], partner_labels=eye[target.labels.flip(0)])

    def of_rows(z):
        ce, entropy, lse = mk.ce_entropy(z, target)
        return (ce + 0.3 * entropy**2 - lse).mean()

    return {
        "mixupe_loss": lambda z: mk.mixupe_loss(z, target, eta=0.5),
        "criterion": lambda z: criterion(z, target),
        "threshold": lambda z: mk.mixupe_loss(z, target, eta=0.5, penalty="threshold"),
        "own penalty": lambda z: mk.mixupe_loss(z, target, eta=0.5, penalty=torch.square),
        "linear_detached": lambda z: mk.mixupe_loss(z, target, eta=0.5, penalty="linear_detached"),
        "clean_weight": lambda z: mk.mixupe_loss(z, target, eta=0.5, clean_weight=0.7),
        "smoothed": lambda z: mk.mixupe_loss(z, target, eta=0.5, rescale=False, label_smoothing=0.1),
        "q_hat": lambda z: mk.q_hat(z, target).square().mean(),
        "ce_entropy": of_rows,
        "soft": lambda z: mk.mixupe_loss(z, soft, eta=0.5),
        "bce_entropy": lambda z: sum(value.square().mean() for value in mk.bce_entropy(z, soft)),
        "sigmoid": lambda z: mk.mixupe_loss(z, soft, eta=0.5, activation="sigmoid"),
        "linear": lambda z: mk.linear_mixupe_loss(z, eye, target, eta=0.5, chunk_rows=2),
        "linear, clean_weight": lambda z: mk.linear_mixupe_loss(
            z, eye, target, eta=0.5, clean_weight=0.7, chunk_rows=2
        ),
    }


NAMES = tuple(losses(mk.MixedTarget(torch.zeros(1, dtype=torch.int64), None, None, 0, 0, 0.0)))


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
    for second in (jacrev(grad(loss)), hessian(loss), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))):
        torch.testing.assert_close(second(logits), expected)
    v = torch.randn_like(logits)
    product = grad(lambda z: (grad(loss)(z) * v).sum())(logits)
    torch.testing.assert_close(product, torch.einsum("ijkl,ij->kl", expected, v))


def test_hessian_of_the_linear_form(backend, logits, target):
    of_linear, of_logits = losses(target)["linear"], losses(target)["mixupe_loss"]
    torch.testing.assert_close(hessian(of_linear)(logits), hessian(of_logits)(logits))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("penalty", ["abs", "threshold", "linear_detached"])
def test_third_derivatives(backend, penalty, activation, logits, target):
    u, v = torch.randn_like(logits), torch.randn_like(logits)
    options = {"eta": 0.5, "penalty": penalty, "activation": activation, "rescale": False}  # η̂ is a constant in all
    labels = torch.rand(2, ROWS, CLASSES, dtype=torch.float64) if activation == "sigmoid" else target[:2]
    target = target._replace(labels=labels[0], partner_labels=labels[1])

    def along(z):
        (first,) = torch.autograd.grad(mk.mixupe_loss(z, target, **options), z, create_graph=True)
        (second,) = torch.autograd.grad((first * u).sum(), z, create_graph=True)
        return second

    step = 1e-5
    above, below = (along((logits + sign * step * v).requires_grad_()).detach() for sign in (1, -1))
    z = logits.clone().requires_grad_()
    (actual,) = torch.autograd.grad((along(z) * v).sum(), z)  # third derivatives are symmetric
    torch.testing.assert_close(actual, (above - below) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_reverse_mode_along_a_direction(backend, name, logits, target):
    loss, v = losses(target)[name], torch.randn_like(logits)
    gradient = by_autograd(loss, logits)
    value, tangent = jvp(loss, (logits,), (v,))
    torch.testing.assert_close((value, tangent), (loss(logits), (gradient * v).sum()))
    torch.testing.assert_close(jacfwd(loss)(logits), gradient)
    for z in (logits, logits.clone().requires_grad_()):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(z, v)))
        torch.testing.assert_close((dual.primal, dual.tangent), (value, tangent))


def central(function, inputs, directions, step=1e-6):
    """The derivative of ``function`` along the directions, by differences."""
    above, below = (
        function(*(x + sign * step * d for x, d in zip(inputs, directions, strict=True))) for sign in (1, -1)
    )
    return [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["labels", "soft", "sigmoid"])
def test_tangents_are_differences(backend, kind, smoothing, logits, target):
    """Of the rows' values in logits, λ and soft labels; the formulas are those of the reference's plain PyTorch."""
    logits[0, 0] = 0.0
    lam = target.lam.clamp(0.1, 0.9)
    labels = torch.rand(2, ROWS, CLASSES, dtype=torch.float64)

    def rows(z, lam, labels):
        own, other = (target.labels, target.partner_labels) if kind == "labels" else labels
        if kind == "sigmoid":
            return mk.bce_entropy(z, (own, other, lam))
        return mk.ce_entropy(z, (own, other, lam), label_smoothing=smoothing)

    inputs = (logits, lam, labels)
    directions = tuple(torch.randn_like(x) for x in inputs)
    _, tangents = jvp(lambda *given: tuple(rows(*given)), inputs, directions)
    for tangent, expected in zip(tangents, central(rows, inputs, directions), strict=True):
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("edge", [0.0, 1.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("penalty", ["abs", "threshold", "linear_detached"])
def test_edges_of_labels_and_lam(backend, penalty, activation, edge, logits):
    """λ and labels of exactly 0 or 1, and sigmoid logits of 0: every mode agrees with the loss by its formula."""
    logits[:, 0] = 0.0
    labels = torch.eye(CLASSES, dtype=torch.float64)[torch.randint(CLASSES, (ROWS,))]
    lam = torch.full((ROWS,), edge, dtype=torch.float64)

    def loss(z, labels, lam):
        target = mk.MixedTarget(labels, labels.flip(0), lam, 4, 3, 0.4)
        return mk.mixupe_loss(z, target, eta=0.5, penalty=penalty, activation=activation, threshold=0.3)

    def formula(z, labels, lam):
        y = lam.unsqueeze(1) * labels + (1 - lam.unsqueeze(1)) * labels.flip(0)
        if activation == "sigmoid":
            p, ce = z.sigmoid(), (torch.nn.functional.softplus(z) - y * z).sum(1)
        else:
            p, ce = z.softmax(1), -(y * z.log_softmax(1)).sum(1)
        q = ((y - p) * z).sum(1)[-3:]
        if penalty == "linear_detached":
            q = (y.detach() * z - (p.detach() * z)).sum(1)[-3:]
        value = {"abs": q.abs(), "threshold": torch.where(q < 0.3, -q, 0), "linear_detached": -q}[penalty]
        total = ce[:4].mean() + 0.5 * 0.4 * value.mean()
        return (ce[:4].mean().abs() / total.abs()).detach() * total

    inputs = logits, labels, lam
    directions = tuple(torch.randn_like(x) for x in inputs)
    every = (0, 1, 2)
    torch.testing.assert_close(grad(loss, every)(*inputs), grad(formula, every)(*inputs))
    torch.testing.assert_close(jvp(loss, inputs, directions), jvp(formula, inputs, directions))
    torch.testing.assert_close(jacfwd(loss, every)(*inputs), jacfwd(formula, every)(*inputs))
    if penalty != "linear_detached":  # its p is a constant in the first derivative alone
        torch.testing.assert_close(hessian(loss, every)(*inputs), hessian(formula, every)(*inputs))
        torch.testing.assert_close(jacfwd(jacfwd(loss, every), every)(*inputs), hessian(formula, every)(*inputs))
    plain = [x.clone().requires_grad_() for x in inputs]
    torch.testing.assert_close(torch.autograd.grad(loss(*plain), plain), torch.autograd.grad(formula(*plain), plain))


@pytest.mark.parametrize("name", ["mixupe_loss", "threshold", "own penalty", "q_hat", "ce_entropy"])
def test_a_class_of_logit_minus_infinity_is_not_there(backend, name, logits, target):
    whole = torch.cat([logits, torch.full((ROWS, 1), -torch.inf, dtype=torch.float64)], 1)
    v = torch.randn_like(whole)
    loss = losses(target)[name]
    torch.testing.assert_close(jvp(loss, (whole,), (v,)), jvp(loss, (logits,), (v[:, :-1],)))
    second = hessian(loss)(whole)
    torch.testing.assert_close(second[:, :-1, :, :-1], hessian(loss)(logits))
    assert (second[:, -1] == 0).all() and (second[..., -1] == 0).all()
    torch.testing.assert_close(jacfwd(jacfwd(loss))(whole), second)


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

    lam[0], lam[1] = 0, 1
    inputs = [x.clone().requires_grad_(), lam.clone().requires_grad_()]
    expected = torch.autograd.grad(value(*inputs), inputs)
    torch.testing.assert_close(grad(value, argnums=(0, 1))(x, lam), expected)
    directions = torch.randn_like(x), torch.randn_like(lam)
    along = sum((g * d).sum() for g, d in zip(expected, directions, strict=True))
    torch.testing.assert_close(jvp(value, (x, lam), directions)[1], along)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, (x, lam), directions)
        torch.testing.assert_close(forward_ad.unpack_dual(value(*duals)).tangent, along)


@pytest.mark.parametrize("partner", ["flip", "permutation"])
def test_second_derivatives_of_mix(backend, partner):
    x, lam = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    partner = torch.tensor([2, 0, 1]) if partner == "permutation" else partner
    rows = torch.tensor([2, 0, 1]) if partner != "flip" else torch.tensor([2, 1, 0])

    def formula(x, lam):
        return (lam.unsqueeze(1) * x + (1 - lam.unsqueeze(1)) * x[rows]).pow(3).sum()

    def value(x, lam):
        return mk.mix(x, partner, lam).pow(3).sum()

    expected = hessian(formula, (0, 1))(x, lam)
    for second in (hessian(value, (0, 1)), jacfwd(jacfwd(value, (0, 1)), (0, 1)), jacrev(grad(value, (0, 1)), (0, 1))):
        torch.testing.assert_close(second(x, lam), expected)
    members = torch.randn(MEMBERS, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(vmap(value, (0, None))(members, lam), torch.stack([value(x, lam) for x in members]))


def test_vmap_maps_every_argument(backend, target):
    """Mapped or shared, wherever its mapped dimension is; class weights too."""
    logits = torch.randn(ROWS, MEMBERS, CLASSES, dtype=torch.float64)
    labels, other = torch.randint(CLASSES, (2, MEMBERS, ROWS))
    lam, weight = torch.rand(MEMBERS, ROWS, dtype=torch.float64), torch.rand(CLASSES, MEMBERS, dtype=torch.float64)

    def rows(z, labels, other, lam, weight):
        return mk.ce_entropy(z, (labels, other, lam), class_weight=weight, label_smoothing=0.1)

    def loss(*given):
        ce, entropy, lse = rows(*given)
        return (ce * lse - entropy).sum()

    for dims in ((1, 0, 0, 0, None), (1, None, 0, None, None), (1, None, None, None, 1), (None, 0, None, 0, 1)):
        every = (logits, labels, other, lam, weight)
        given = [
            v if dim is not None else v.select(d, 0) for v, dim, d in zip(every, dims, (1, 0, 0, 0, 1), strict=True)
        ]
        members = [
            [v if dim is None else v.select(dim, i) for v, dim in zip(given, dims, strict=True)] for i in range(MEMBERS)
        ]
        for one in (rows, grad(loss), grad(loss, 3)):
            actual, expected = vmap(one, dims)(*given), [one(*member) for member in members]
            if one is rows:
                expected = [torch.stack(values) for values in zip(*expected, strict=True)]
            torch.testing.assert_close(tuple(actual), tuple(expected))


def test_vmap_calls_an_operator_once(target):
    logits = torch.randn(MEMBERS, ROWS, CLASSES, dtype=torch.float64)

    def gradient(z):
        return grad(lambda z: mk.mixupe_loss(z, target, eta=0.5))(z)

    with torch.profiler.profile() as profile:
        vmap(gradient)(logits)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("mixupe::")}
    assert counts == {"mixupe::ce_entropy": 1, "mixupe::ce_entropy_backward": 1}


def test_a_tensor_that_outlived_its_transform(backend, logits, target):
    left = []

    def leaving(z):
        left.append(2 * z)
        return z.sum()

    z = logits.clone().requires_grad_()
    grad(leaving)(z)
    for loss in losses(target).values():
        (actual,) = torch.autograd.grad(loss(left[0]), z, retain_graph=True)
        torch.testing.assert_close(actual, 2 * by_autograd(loss, 2 * logits))
