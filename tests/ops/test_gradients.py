"""Derivatives of every operator against finite differences, compiled graphs, autocast."""

import pytest
import torch

import mixupe_kernels as mk

ops = torch.ops.mixupe


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradient_cases():
    labels, partner = torch.randint(5, (4,)), torch.randint(5, (4,))
    labels[0] = -100
    lam = torch.rand(4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64)
    index = torch.tensor([1, 1, 0, 2])
    target = mk.MixedTarget(labels, partner, lam.detach(), 2, 3, 0.3)
    return {
        "ce_entropy, index": (lambda z: mk.ce_entropy(z, labels, label_smoothing=0.1), doubles(4, 5)),
        "ce_entropy, mixed": (
            lambda z, lam: mk.ce_entropy(z, (labels, partner, lam), label_smoothing=0.1, class_weight=weight),
            doubles(4, 5),
            lam,
        ),
        "ce_entropy, dense": (lambda z, y: mk.ce_entropy(z, y, class_weight=weight), doubles(4, 5), doubles(4, 5)),
        "bce_entropy": (mk.bce_entropy, doubles(4, 5), doubles(4, 5)),
        "q_hat": (mk.q_hat, doubles(4, 5), doubles(4, 5)),
        "mixupe_loss": (lambda z: mk.mixupe_loss(z, target, eta=0.3, rescale=False), doubles(4, 5)),
        "mixupe_loss, squared": (lambda z: mk.mixupe_loss(z, target, eta=0.3, rescale=False) ** 2, doubles(4, 5)),
        "mixupe_loss, clean_weight": (
            lambda z: mk.mixupe_loss(z, target, eta=0.3, clean_weight=0.7, rescale=False),
            doubles(4, 5),
        ),
        "mixupe_loss, threshold": (
            lambda z: mk.mixupe_loss(z, target, eta=0.3, rescale=False, penalty="threshold"),
            doubles(4, 5),
        ),
        "mixupe_loss, learned target": (
            lambda z, y: mk.mixupe_loss(
                z, mk.MixedTarget(y, y.flip(1), lam.detach(), 3, 2, 0.3), eta=0.3, clean_weight=0.7, rescale=False
            ),
            doubles(4, 5),
            doubles(4, 5),
        ),
        "mix, one lam": (
            lambda x, lam: mk.mix(x, index, lam),
            doubles(4, 3),
            torch.tensor(0.3).double().requires_grad_(),
        ),
        "mix, lam each": (lambda x, lam: mk.mix(x, index, lam), doubles(4, 3, 2), lam),
        "mix, flip": (lambda x, lam: mk.mix(x, "flip", lam), doubles(4, 3), lam),
        "mix, inside a box": (
            lambda x, lam: ops.mix(x, index, lam, torch.tensor([2, 0, 0, 3]), box=torch.tensor([1, 3, 0, 1])),
            doubles(4, 1, 3, 2),
            lam,
        ),
        "mix, many": (lambda x, w: mk.mix(x, index.view(2, 2)[[0, 1, 1, 0]], w), doubles(4, 3), doubles(4, 2)),
    }


GRADIENT_CASES = list(gradient_cases())


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradcheck(backend, slow, name):
    """Every entry of the Jacobian; of a slow backend its products with random vectors, which take an eighth of the time.

    One entry has little weight in those: an error of a hundredth shows at these tolerances, not at gradcheck's own.
    """
    function, *inputs = gradient_cases()[name]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(function, inputs, atol=1e-7, rtol=1e-5, fast_mode=slow)


def test_lam_has_a_gradient_through_uint8_images(backend):
    pixels, partner = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8), torch.tensor([1, 2, 3, 0])
    scale, shift = torch.rand(3) / 255, torch.randn(3)
    lam = torch.rand(4, requires_grad=True)
    upstream = torch.randn(4, 3, 2, 2)
    (actual,) = torch.autograd.grad(ops.mix(pixels, partner, lam, None, scale, shift, torch.float32), lam, upstream)
    difference = (pixels.float() - pixels[partner].float()) * scale.view(1, 3, 1, 1)
    torch.testing.assert_close(actual, (upstream * difference).sum((1, 2, 3)))


def test_compiles_without_graph_breaks(backend):
    labels = torch.randint(5, (8,))
    target = mk.MixedTarget(labels, labels.flip(0), torch.rand(8), 4, 4, 0.3)
    criterion = mk.MixupELoss(eta=0.5, clean_weight=0.25)
    model = torch.nn.Linear(3, 5)

    def step(x, partner, lam):
        return criterion(model(mk.mix(x, partner, lam)), target)

    inputs = (torch.randn(8, 3), torch.randperm(8), torch.rand(8))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = step(*inputs), compiled(*inputs)
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, graph)


def test_autocast_gives_float32_losses(backend):
    model, x, labels = torch.nn.Linear(3, 5), torch.randn(8, 3), torch.randint(5, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        outputs = mk.ce_entropy(logits, labels)
    assert logits.dtype == torch.bfloat16 and outputs.ce.dtype == torch.float32
    outputs.ce.mean().backward()
    assert model.weight.grad.dtype == torch.float32
