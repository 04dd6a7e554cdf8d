"""Bad input of the operators and the functions over them: refused by name, and nothing changed."""

import pytest
import torch

import mixupe_kernels as mk

ops = torch.ops.mixupe

GOOD = {
    "x": torch.zeros(4, 3),
    "partner": torch.tensor([1, 2, 3, 0]),
    "logits": torch.zeros(4, 3),
    "labels": torch.tensor([0, 1, 2, 0]),
}


@pytest.mark.refuses
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a batch dimension"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x must have dtype float32.*got int64"),
        ({"partner": torch.zeros(3, dtype=torch.int64)}, ValueError, r"partner must have shape \(4,\), got \(3,\)"),
        ({"partner": torch.zeros(4)}, TypeError, "partner must have dtype int64, got float32"),
        ({"partner": "shuffle"}, ValueError, "partner must be one of 'flip', got 'shuffle'"),
        ({"partner": torch.tensor([0, 1, 2, 4])}, ValueError, r"partner must be in \[0, 3\], got 4"),
        ({"partner": torch.tensor([0, -1, 2, 3])}, ValueError, r"partner must be in \[0, 3\], got -1"),
        ({"lam": 1.5}, ValueError, r"lam must be a number in \[0, 1\], got 1.5"),
        ({"lam": float("nan")}, ValueError, r"lam must be a number in \[0, 1\], got nan"),
        ({"lam": "half"}, TypeError, "lam must be a number"),
        ({"lam": torch.tensor(-0.5)}, ValueError, r"lam must be in \[0, 1\], got -0.5"),
        ({"lam": torch.tensor([0.1, 0.2, torch.nan, 0.3])}, ValueError, r"lam must be in \[0, 1\], got nan"),
        ({"lam": torch.zeros(3)}, ValueError, r"lam must have shape \(4,\), got \(3,\)"),
        ({"out": torch.zeros(4, 2)}, ValueError, r"out must have shape \(4, 3\), got \(4, 2\)"),
    ],
)
def test_mix_refuses(backend, change, error, message):
    arguments = {"x": GOOD["x"], "partner": GOOD["partner"], "lam": 0.5, **change}
    with pytest.raises(error, match=message):
        mk.mix(**arguments)


UNWRITABLE = {
    "expanded rows": lambda: torch.zeros(1, 3).expand(4, 3),
    "expanded columns": lambda: torch.zeros(4, 1).expand(4, 3),
    "overlapping rows": lambda: torch.zeros(12).as_strided((4, 3), (2, 1)),
    "negative": lambda: torch._neg_view(torch.zeros(4, 3)),
    "imaginary part of a conjugate": lambda: torch.zeros(4, 3, dtype=torch.complex64).conj().imag,
}


@pytest.mark.refuses
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_out_that_cannot_be_written_is_refused(backend, kind):
    out = UNWRITABLE[kind]()
    with pytest.raises(ValueError, match="out must not"):
        mk.mix(GOOD["x"] + 1, GOOD["partner"], 0.5, out=out)
    with pytest.raises(ValueError, match="out must not"):
        mk.Mixup()(GOOD["x"] + 1, GOOD["labels"], out=out)
    assert not out.any()


def test_out_may_have_any_strides_of_its_own(backend):
    x = torch.randn(4, 3)
    for out in (torch.zeros(4, 6)[:, ::2], torch.zeros(3, 4).t(), torch.zeros(4, 3, dtype=torch.complex64).imag):
        assert torch.equal(mk.mix(x, GOOD["partner"], 0.5, out=out), mk.mix(x, GOOD["partner"], 0.5))


@pytest.mark.refuses
@pytest.mark.parametrize("lam", [torch.tensor(0.5), torch.full((4,), 0.5)])
def test_a_sparse_lam_is_refused(backend, lam):
    with pytest.raises(TypeError, match="lam must be a dense tensor, got a sparse_coo one"):
        mk.mix(GOOD["x"], GOOD["partner"], lam.to_sparse())


@pytest.mark.parametrize("name", ["x", "lam", "out"])
def test_out_is_refused_where_a_gradient_is_wanted(backend, name):
    values = {"x": torch.randn(4, 3), "lam": torch.rand(4), "out": torch.zeros(4, 3)}
    values[name].requires_grad_()

    def mix():
        return mk.mix(values["x"], "flip", values["lam"], out=values["out"])

    with pytest.raises(ValueError, match=f"{name} must not require a gradient with out"):
        mix()
    assert not values["out"].any()
    with torch.no_grad():
        torch.testing.assert_close(mix(), mk.mix(values["x"], "flip", values["lam"]))


@pytest.mark.parametrize("alone", ["scale", "shift"])
def test_scale_and_shift_are_given_together(backend, alone):
    x, lam = GOOD["x"], torch.rand(4)
    for operator, out in ((ops.mix, {}), (ops.mix_out, {"out": torch.zeros(4, 3)})):
        with pytest.raises((ValueError, RuntimeError), match="scale and shift must be given together"):
            operator(x, GOOD["partner"], lam, **{alone: torch.ones(3)}, **out)


@pytest.mark.refuses
def test_out_is_unchanged_by_bad_input(backend):
    out = torch.full((4, 3), 7.0)
    with pytest.raises(ValueError, match="partner must be in"):
        mk.mix(GOOD["x"], torch.tensor([0, 1, 2, 4]), 0.5, out=out)
    assert torch.equal(out, torch.full((4, 3), 7.0))


@pytest.mark.refuses
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "logits must have dtype float32.*got int64"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits must have shape"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "logits must have shape"),
        ({"target": torch.tensor([0, 1, 2, 3])}, ValueError, r"target must be a class in \[0, 2\], got 3"),
        ({"target": torch.tensor([0, 1, -1, 2])}, ValueError, r"target must be a class in \[0, 2\], got -1"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target must have dtype int64, got int32"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have shape \(4,\), got \(3,\)"),
        ({"target": torch.zeros(4, 2)}, ValueError, r"target must have shape \(4, 3\), got \(4, 2\)"),
        (
            {"target": torch.zeros(4, device="meta")},
            ValueError,
            "target must be on the device of logits, cpu, got meta",
        ),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 1.5"),
        ({"class_weight": torch.zeros(4)}, ValueError, r"class_weight must have shape \(3,\), got \(4,\)"),
    ],
)
def test_ce_entropy_refuses(backend, change, error, message):
    arguments = {"logits": GOOD["logits"], "target": GOOD["labels"], **change}
    with pytest.raises(error, match=message):
        mk.ce_entropy(**arguments)


def test_box_must_be_four_edges_of_images(backend):
    x, partner, lam = torch.randn(4, 6, 6), torch.arange(4), torch.rand(4)
    for images, box, message in (
        (x, torch.tensor([0, 1, 2]), r"box must have shape \(4,\)"),
        (x, torch.rand(4), "box must have dtype int64"),
        (x[0, :4], torch.tensor([0, 1, 0, 1]), "box needs x of"),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            ops.mix(images, partner, lam, box=box)


def test_mixing_into_its_own_input_needs_flip():
    if "cpp" not in mk.available_backends():
        pytest.skip("the reference computes before it writes")
    x = torch.randn(4, 3)
    with pytest.raises((ValueError, RuntimeError), match="out"):
        mk.mix(x, torch.tensor([1, 2, 3, 0]), 0.5, out=x)
