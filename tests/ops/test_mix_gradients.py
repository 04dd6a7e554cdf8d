"""Gradients of mix: dtypes that differ from the result's, what a box hides, images of no pixels."""

import pytest
import torch

import mixupe_kernels as mk

ops = torch.ops.mixupe


def gradients(x, partner, lam, upstream, *more, box=None, dtype=None):
    """dx and dλ by the operator."""
    x, lam = x.detach().clone(), lam.detach().clone().requires_grad_()
    wanted = [lam]
    if x.is_floating_point():
        wanted.insert(0, x.requires_grad_())
    out = ops.mix(x, partner, lam, None, *(more or (None, None)), dtype, None, box)
    return torch.autograd.grad(out, wanted, upstream.to(out.dtype))


def written_out(x, partner, lam, upstream):
    """dx and dλ by autograd in float64, for the gradient that the operator was given."""
    x, lam = x.detach().double().requires_grad_(), lam.detach().double().requires_grad_()
    weight = lam.view(-1, *[1] * (x.dim() - 1))
    out = weight * x + (1 - weight) * x[partner]
    return torch.autograd.grad(out, (x, lam), upstream.double())


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_gradients_are_rounded_to_their_own_dtypes_alone(backend, source, result):
    compute = torch.float64 if source == torch.float64 else torch.float32
    x, lam = torch.randn(5, 3, 7).to(source), torch.rand(5).to(compute)
    partner = torch.tensor([1, 1, 0, 4, 2])
    upstream = torch.randn(5, 3, 7).to(result)
    dx, dlam = gradients(x, partner, lam, upstream, dtype=result)
    assert dx.dtype == source and dlam.dtype == compute
    for actual, expected in zip((dx, dlam), written_out(x, partner, lam, upstream), strict=True):
        # float32 arithmetic on values of a few units, unless both are float64; then one rounding.
        wide = torch.float64 if source == torch.float64 else torch.float32
        bound = 64 * torch.finfo(wide).eps + torch.finfo(actual.dtype).eps * expected.abs()
        assert ((actual.double() - expected).abs() <= bound).all()


def test_dlam_of_pixels_normalised_to_bfloat16(backend):
    """The scale is not rounded to the result's dtype on the way."""
    pixels, partner = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8), torch.tensor([1, 2, 3, 0])
    scale, shift, lam = torch.rand(3) / 255, torch.randn(3), torch.rand(4)
    upstream = torch.randn(4, 3, 2, 2).bfloat16()
    (dlam,) = gradients(pixels, partner, lam, upstream, scale, shift, dtype=torch.bfloat16)
    difference = (pixels.double() - pixels[partner].double()) * scale.double().view(1, 3, 1, 1)
    expected = (upstream.double() * difference).sum((1, 2, 3))
    torch.testing.assert_close(dlam.double(), expected, rtol=1e-6, atol=1e-6)


def test_what_a_box_hides_has_no_part_in_dlam(backend):
    x, lam, partner = torch.randn(4, 2, 5, 6), torch.rand(4), torch.tensor([1, 2, 3, 0])
    upstream, box = torch.randn(4, 2, 5, 6), torch.tensor([1, 3, 2, 5])
    clean = gradients(x, partner, lam, upstream, box=box)
    x[2, 0, 1, 2], x[3, 1, 2, 4] = torch.nan, torch.inf  # inside the box
    for actual, expected in zip(gradients(x, partner, lam, upstream, box=box), clean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(4, 3, 0, 5), (4, 0, 5, 5), (4, 0), (0, 3, 5, 5), (0, 0)], ids=str)
@pytest.mark.parametrize("pairing", ["flip", "partner"])
def test_images_of_no_pixels(backend, shape, pairing):
    x, lam = torch.zeros(shape, requires_grad=True), torch.rand(shape[0], requires_grad=True)
    partner = "flip" if pairing == "flip" else torch.arange(shape[0])
    out = mk.mix(x, partner, lam)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape and torch.equal(lam.grad, torch.zeros(shape[0]))
    with torch.no_grad():
        mk.mix(x, partner, lam, out=torch.empty(shape))
    if len(shape) == 4:
        half, box = torch.tensor(0.5), torch.tensor([0, 1, 0, 1])
        scale = torch.ones(shape[1])
        assert (
            ops.mix(x.detach(), None, half, None, scale, scale, torch.bfloat16, torch.channels_last, box).shape == shape
        )
        pixels = torch.empty(shape, dtype=torch.uint8)
        assert ops.mix(pixels, torch.arange(shape[0]), half, None, scale, scale, torch.float32).shape == shape


@pytest.mark.parametrize("shape", [(4, 3, 0, 0), (4, 3, 5, 0), (4, 0, 0, 0), (1, 3, 0, 0), (4, 3, 2, 0, 0)], ids=str)
@pytest.mark.parametrize("source", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_of_no_pixels_in_every_form(backend, shape, source, normalised, channels_last):
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if channels_last else None
    batch, compute = shape[0], torch.float64 if source == torch.float64 else torch.float32
    x = torch.zeros(shape, dtype=source, requires_grad=source.is_floating_point)
    x_in = x if memory_format is None else x.contiguous(memory_format=memory_format)
    numbers = [torch.ones(shape[1], dtype=compute)] * 2 if normalised else [None, None]
    result = torch.float32 if source == torch.uint8 else None
    for rows in (None, torch.arange(batch).repeat(2)):
        count = batch if rows is None else 2 * batch
        for partner, box in ((None, None), (torch.arange(count) % batch, torch.tensor([0, 3, 0, 2]))):
            lam = torch.rand(count, dtype=compute, requires_grad=True)
            out = ops.mix(x_in, partner, lam, rows, *numbers, result, memory_format, box)
            assert out.shape == (count, *shape[1:]) and out.dtype == (result or source)
            wanted = (x, lam) if source.is_floating_point else (lam,)
            for value, gradient in zip(wanted, torch.autograd.grad(out.sum(), wanted), strict=True):
                assert torch.equal(gradient, torch.zeros_like(value))
            ops.mix_out(x_in.detach(), partner, lam.detach(), rows, *numbers, box, out=torch.empty_like(out))


@pytest.mark.parametrize("source", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}, {"cutmix_alpha": 1.0}], ids=str)
def test_a_mixers_images_of_no_pixels(backend, source, options):
    x, labels = torch.zeros(4, 3, 0, 0, dtype=source), torch.arange(4)
    for kind in (mk.Mixup, mk.MixupE):
        fn = kind(**options)
        rows, target = fn(x, labels)
        assert rows.shape == (len(target.lam), 3, 0, 0)
        assert rows.dtype == (torch.float32 if "mean" in options else source)
        fn(x, labels, out=torch.empty(8, 3, 0, 0, dtype=rows.dtype))
