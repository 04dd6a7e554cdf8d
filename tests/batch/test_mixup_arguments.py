"""What mixers take and show: errors, signatures, repr, attributes, and the budget of calls."""

import inspect
import re

import pytest
import torch

import mixupe_kernels as mk

from .batches import CLASSES, samples, seeded


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: mk.MixupE(-0.1), ValueError, "alpha must be a number >= 0, got -0.1"),
        (lambda x, y: mk.MixupE("1", lam_distribution=mk.sampling.Uniform()), TypeError, "alpha must be a number"),
        (lambda x, y: mk.MixupE(0, beta=1.0), ValueError, "beta must be None where alpha is 0"),
        (lambda x, y: mk.MixupE(1, beta=-1), ValueError, "beta must be a number > 0"),
        (lambda x, y: mk.MixupE(clean_fraction=0), ValueError, r"clean_fraction must be a number in \(0, 1\], got 0"),
        (lambda x, y: mk.MixupE(clean_fraction=float("nan")), ValueError, "clean_fraction"),
        (lambda x, y: mk.MixupE(split=True), ValueError, "clean_fraction must be below 1 with split"),
        (lambda x, y: mk.MixupE(regularize="mixed", clean_fraction=0.5), ValueError, "regularize must be 'clean'"),
        (lambda x, y: mk.MixupE(regularize="both"), ValueError, "regularize must be one of"),
        (lambda x, y: mk.MixupE(interval=0), ValueError, "interval must be an int >= 1, got 0"),
        (lambda x, y: mk.MixupE(prob=1.1), ValueError, r"prob must be a number in \[0, 1\], got 1.1"),
        (lambda x, y: mk.MixupE(pairing="nearest"), ValueError, "pairing must be one of"),
        (lambda x, y: mk.Mixup(num_samples=1), ValueError, "num_samples must be an int >= 2, got 1"),
        (lambda x, y: mk.Mixup(num_samples=3, beta=2.0), ValueError, "beta must be None with num_samples > 2"),
        (lambda x, y: mk.Mixup(num_samples=3)(x, y), ValueError, "num_classes must be given"),
        (lambda x, y: mk.Mixup()(torch.tensor(1.0), y), ValueError, "x must have a batch dimension"),
        (lambda x, y: mk.Mixup()(x.long(), y), TypeError, "x must have dtype float32, .*, got int64"),
        (lambda x, y: mk.Mixup()("x", y), TypeError, "x must be a tensor, or a tuple, list or dict"),
        (lambda x, y: mk.Mixup()(x), TypeError, "labels must be a torch.Tensor, got NoneType"),
        (lambda x, y: mk.Mixup()(x, y[:5]), ValueError, "labels must have one row for each of the 24 samples"),
        (lambda x, y: mk.Mixup()(x, y.float()), ValueError, r"soft labels must have shape \(B, C\), got \(24,\)"),
        (lambda x, y: mk.Mixup()(x, y.int()), TypeError, "labels must have dtype int64, got int32"),
        (lambda x, y: mk.Mixup()(x, y.to("meta")), ValueError, "labels must be on the device of x"),
        (
            lambda x, y: mk.Mixup(pairing=lambda *_: torch.full((24,), 24))(x, y),
            ValueError,
            r"pairing\(size, generator, device\) must be in \[0, 23\], got 24",
        ),
        (lambda x, y: mk.Mixup(num_samples=3, num_classes=CLASSES)(x, y - 1), ValueError, "labels must be .* -1"),
        (
            lambda x, y: mk.mix_labels(y.view(4, 6), torch.arange(4), 0.5, CLASSES),
            ValueError,
            r"labels must have shape \(4, 5\)",
        ),
        (lambda x, y: mk.mix_labels(y, y, 1.5, CLASSES), ValueError, "lam"),
        (lambda x, y: mk.mix_labels(y, y, 0.5, 2), ValueError, "class"),
    ],
)
def test_errors(call, error, message):
    x, labels = samples()
    labels[0] = CLASSES - 1
    with pytest.raises(error, match=message):
        call(x, labels)


def test_an_error_draws_nothing():
    x, labels = samples()
    fn = mk.MixupE(generator=seeded())
    state = fn.generator.get_state()
    for bad in (lambda: fn(x.long(), labels), lambda: fn(x, labels[1:]), lambda: fn(x, labels, out=torch.empty(3, 3))):
        with pytest.raises((TypeError, ValueError)):
            bad()
    assert torch.equal(fn.generator.get_state(), state) and fn.steps == 0


def test_mix_labels():
    labels, partner = torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0])
    lam = torch.tensor([0.25, 0.5, 1.0])
    expected = torch.tensor([[0.25, 0, 0.75], [0, 0.5, 0.5], [0, 1, 0]])
    torch.testing.assert_close(mk.mix_labels(labels, partner, lam, 3), expected)
    smooth = expected * 0.7 + 0.3 / 3
    torch.testing.assert_close(mk.mix_labels(labels, partner, lam, 3, label_smoothing=0.3), smooth)
    one_hot = torch.eye(3)[labels]
    for soft in (one_hot, one_hot.double(), one_hot.long()):  # torch.nn.functional.one_hot's are int64
        torch.testing.assert_close(mk.mix_labels(soft, partner, lam, 3), expected)
        torch.testing.assert_close(mk.mix_labels(soft, partner, lam, 3, label_smoothing=0.3), smooth)
        torch.testing.assert_close(mk.mix_labels(soft, partner, 0.5, 3), (one_hot + one_hot[partner]) / 2)
    ignored = torch.tensor([0, -100, 1])
    expected = torch.tensor([[0.25, 0, 0], [0, 0.5, 0], [0, 1, 0]])
    torch.testing.assert_close(mk.mix_labels(ignored, partner, lam, 3), expected)


MIXERS = [mk.Mixup, mk.MixupE]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_argument_stands_in_the_signature(mixer):
    parameters = inspect.signature(mixer).parameters.values()
    assert {parameter.kind for parameter in parameters} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    assert [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD] == [
        "alpha"
    ]
    documented = mk.Mixup.__doc__ + mixer.__doc__
    for parameter in parameters:
        assert re.search(rf"\b{parameter.name}\b[^\n]*: ", documented), parameter.name
    with pytest.raises(TypeError, match=rf"{mixer.__name__} has no argument 'clean_fracton', write"):
        mixer(clean_fracton=0.5)
    with pytest.raises(TypeError, match=rf"{mixer.__name__}.* positional argument"):
        mixer(1.0, 1.0)


def test_repr_shows_what_was_given():
    assert repr(mk.Mixup()) == "Mixup(1.0)"
    assert repr(mk.MixupE(0.2, clean_fraction=1 / 4, pairing="flip")) == (
        "MixupE(0.2, pairing='flip', clean_fraction=0.25)"
    )
    fn = mk.MixupE(mk.LinearRamp(0.1, 1, last_epoch=5), mean=torch.zeros(3), std=[1, 1, 1], generator=seeded(3))
    assert repr(fn) == (
        "MixupE(LinearRamp(0.1, 1, 0, last_epoch=5), mean=tensor([0., 0., 0.]), std=[1, 1, 1], generator=<cpu, seed 3>)"
    )
    assert repr(mk.Mixup(lam_distribution=mk.sampling.Fixed(0.5))) == "Mixup(1.0, lam_distribution=Fixed(value=0.5))"


@pytest.mark.parametrize("mixer", MIXERS)
def test_attributes_that_would_change_nothing_are_refused(mixer):
    fn = mixer()
    with pytest.raises(AttributeError, match=f"a {mixer.__name__} has no attribute 'enabld' to set; it has .*enabled"):
        fn.enabld = False
    with pytest.raises(AttributeError, match=f"prob of a {mixer.__name__} is fixed by its constructor"):
        fn.prob = 0.5
    with pytest.raises(TypeError, match="enabled must be True or False, got str 'no'"):
        fn.enabled = "no"
    fn.enabled = False
    assert fn.enabled is False and not fn.active


def test_apply_refuses_out_where_a_gradient_is_wanted():
    mixer, hidden = mk.Mixup(0.4), torch.randn(4, 3, requires_grad=True)
    draw = mixer.draw(torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="x must not require a gradient with out"):
        mixer.apply(draw, hidden, out=torch.empty(4, 3))
    with torch.no_grad():
        torch.testing.assert_close(mixer.apply(draw, hidden, out=torch.empty(4, 3)), mixer.apply(draw, hidden))
