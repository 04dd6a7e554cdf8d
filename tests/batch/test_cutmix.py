"""CutMix in the same object: boxes, their λ, what is pasted, and that it alternates with mixup."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mixupe_kernels as mk
from mixupe_kernels.batch import cutmix
from mixupe_kernels.batch.mixup import write

MEAN, STD = (0.4, 0.5), (0.2, 0.3)


def expected_rows(draw, x):
    """The mixed rows of a draw from the definition, in float64; x normalised already."""
    count = draw.target.num_mixed
    rows = torch.arange(len(x)) if draw.rows is None else draw.rows[:count]
    partner = len(x) - 1 - rows if draw.partner is None else draw.partner[:count]
    own, other = x.double()[rows], x.double()[partner]
    lam = draw.lam.double().expand(len(draw.target.lam))[:count].reshape(-1, *[1] * (x.dim() - 1))
    mixed = lam * own + (1 - lam) * other
    for row, box in enumerate(draw.box.expand(len(draw.target.lam), 4)[:count].tolist()):
        top, bottom, left, right = box
        mixed[row, ..., top:bottom, left:right] = other[row, ..., top:bottom, left:right]
    return mixed


def call_and_draw(fn, x, labels):
    state = fn.generator.get_state()
    draw = fn.draw(labels, image_size=tuple(x.shape[-2:]))
    fn.generator.set_state(state)
    fn.steps -= 1
    return fn(x, labels), draw


@given(lam=st.floats(0, 1), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 1000))
def test_lam_is_the_share_outside_the_box(lam, height, width, seed):
    box, area_lam = cutmix.draw_box(torch.tensor(lam), height, width, torch.Generator().manual_seed(seed))
    top, bottom, left, right = box.tolist()
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    assert area_lam.item() == pytest.approx(1 - (bottom - top) * (right - left) / (height * width), abs=1e-6)
    assert 0 <= area_lam <= 1 and area_lam.item() >= lam - 1e-6  # clipping only makes the box smaller


def test_box_of_half_the_area_where_it_fits():
    generator = torch.Generator().manual_seed(0)
    boxes = [cutmix.draw_box(torch.tensor(0.75), 64, 32, generator)[0].tolist() for _ in range(200)]
    inside = [(low - top, right - left) for top, low, left, right in boxes if top and low < 64 and left and right < 32]
    assert inside and set(inside) == {(32, 16)}  # sqrt(1 - 0.75) = 1/2 of each side


@pytest.mark.parametrize(
    "options", [{}, {"clean_fraction": 1 / 4}, {"clean_fraction": 1 / 4, "split": True}, {"regularize": "mixed"}]
)
@pytest.mark.parametrize("pairing", ["random", "flip"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rows(options, pairing, dtype, backend):
    x = torch.randint(0, 256, (16, 2, 9, 7), dtype=torch.uint8)
    values = (x.double() / 255 - torch.tensor(MEAN).double().view(2, 1, 1)) / torch.tensor(STD).double().view(2, 1, 1)
    if dtype == torch.float32:
        x = x.float() / 255
    labels = torch.arange(16)
    generator = torch.Generator().manual_seed(0)
    fn = mk.MixupE(cutmix_alpha=1.0, pairing=pairing, mean=MEAN, std=STD, generator=generator, **options)
    cut = 0
    for _ in range(8):
        (rows, target), draw = call_and_draw(fn, x, labels)
        top, bottom, left, right = draw.box.tolist()
        cut += bottom > top and right > left
        torch.testing.assert_close(rows[: target.num_mixed].double(), expected_rows(draw, values), rtol=1e-5, atol=1e-5)
        clean = values[draw.rows[target.num_mixed :]] if draw.rows is not None else values[:0]
        torch.testing.assert_close(rows[target.num_mixed :].double(), clean, rtol=1e-5, atol=1e-5)
        if bottom > top and right > left:  # the label's λ is the share of pixels that stayed
            assert target.lam[0].item() == pytest.approx(1 - (bottom - top) * (right - left) / 63, abs=1e-6)
        assert bool((target.lam[: target.num_mixed] == target.lam[0]).all())
        assert bool((target.lam[target.num_mixed :] == 1).all())
        assert float(target.reg_weight) == pytest.approx(1 / 3)
    assert 0 < cut < 8


@pytest.mark.parametrize(
    "options", [{}, {"clean_fraction": 1 / 4}, {"clean_fraction": 1 / 4, "split": True}, {"regularize": "mixed"}]
)
@pytest.mark.parametrize(("pairing", "per_sample"), [("random", True), ("flip", True), ("flip", "pair")])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [16, 7])
def test_a_box_for_each_sample(options, pairing, per_sample, dtype, batch):
    x = torch.randint(0, 256, (batch, 2, 9, 7), dtype=torch.uint8)
    values = (x.double() / 255 - torch.tensor(MEAN).double().view(2, 1, 1)) / torch.tensor(STD).double().view(2, 1, 1)
    if dtype == torch.float32:
        x = x.float() / 255
    labels, generator = torch.arange(batch), torch.Generator().manual_seed(0)
    fn = mk.MixupE(
        cutmix_alpha=1.0, pairing=pairing, per_sample=per_sample, mean=MEAN, std=STD, generator=generator, **options
    )
    cut = mixed = 0
    for _ in range(4):
        (rows, target), draw = call_and_draw(fn, x, labels)
        count = target.num_mixed
        torch.testing.assert_close(rows[:count].double(), expected_rows(draw, values), rtol=1e-5, atol=1e-5)
        clean = values[draw.rows[count:]] if draw.rows is not None else values[:0]
        torch.testing.assert_close(rows[count:].double(), clean, rtol=1e-5, atol=1e-5)
        area = (draw.box[:count, 1] - draw.box[:count, 0]) * (draw.box[:count, 3] - draw.box[:count, 2])
        lam = target.lam[:count]
        torch.testing.assert_close(lam[area > 0], (1 - area / 63)[area > 0])
        cut, mixed = cut + int((area > 0).sum()), mixed + int(((area == 0) & (lam < 1)).sum())
        if per_sample == "pair":
            of = torch.arange(batch) if draw.rows is None else draw.rows[:count]
            for one, other in torch.combinations(torch.arange(count)).tolist():
                if of[one] + of[other] == batch - 1:
                    assert lam[one] == lam[other] and torch.equal(draw.box[one], draw.box[other])
        assert len(lam.unique()) > 1
    assert cut > 4 and mixed > 4


def test_one_lam_for_each_pair():
    x, labels = torch.randn(7, 3), torch.arange(7)
    mixed, target = mk.Mixup(pairing="flip", per_sample="pair", prob=0.8)(x, labels)
    assert torch.equal(target.lam, target.lam.flip(0)) and len(target.lam.unique()) > 2
    torch.testing.assert_close(mixed + mixed.flip(0), x + x.flip(0))


def test_sides_between_two_shares():
    minmax, generator = (0.25, 0.75), torch.Generator().manual_seed(0)
    boxes, lam = cutmix.draw_box_of_sides(minmax, (4000,), 16, 8, generator, torch.device("cpu"))
    top, bottom, left, right = boxes.unbind(1)
    assert set((bottom - top).tolist()) == set(range(4, 12)) and set((right - left).tolist()) == set(range(2, 6))
    assert set(top.tolist()) == set(range(13)) and bottom.max() == 16 and top.min() == 0 and right.max() == 8
    torch.testing.assert_close(lam, 1 - (bottom - top) * (right - left) / 128)
    (whole, none), _ = cutmix.draw_box_of_sides((1.0, 1.0), (2,), 16, 8, generator, torch.device("cpu"))
    assert whole.tolist() == none.tolist() == [0, 16, 0, 8]


def test_lam_as_it_was_drawn():
    boxes = cutmix.Boxes(1.0, correct_lam=False)
    lam, pixel_lam, box = boxes.draw(torch.rand(4000), (9, 7), torch.Generator().manual_seed(0), 1.0, 1.0)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    assert bool((pixel_lam == 1).all()) and not torch.allclose(lam, 1 - area / 63)
    assert abs(float(lam.mean()) - 0.5) < 4 * (1 / 12 / 4000) ** 0.5  # uniform, where a clipped box's is above


def test_a_batch_with_a_box_is_one_graph():
    x, labels = torch.randn(8, 3, 9, 7), torch.arange(8)
    fn = mk.MixupE(cutmix_alpha=1.0, switch_prob=1.0, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    arguments = fn.transform.arguments("x", x, True)
    torch._dynamo.reset()
    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        draw = fn.draw(labels, image_size=(9, 7))
        assert torch.equal(compiled(draw, x, arguments, None), write(draw, x, arguments, None))


def test_switch_prob_and_prob():
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)

    def share(**options):
        fn = mk.Mixup(cutmix_alpha=1.0, generator=torch.Generator().manual_seed(0), **options)
        draws = [fn.draw(labels, image_size=(8, 8)) for _ in range(1000)]
        cut = sum(bool(draw.box.any()) for draw in draws)
        mixed = sum(bool(draw.lam < 1) for draw in draws)
        assert all(bool(draw.lam == 1) for draw in draws if draw.box.any())
        return cut / 1000, mixed / 1000

    cut, mixed = share(switch_prob=0.0)
    assert cut == 0 and mixed > 0.99
    cut, mixed = share(switch_prob=1.0)
    assert cut > 0.8 and mixed == 0
    cut, mixed = share(switch_prob=0.25)
    assert abs(mixed - 0.75) < 4 * (0.25 * 0.75 / 1000) ** 0.5
    assert share(prob=0.0) == (0, 0)
    fn = mk.Mixup(cutmix_alpha=1.0, switch_prob=1.0, prob=0.0)
    rows, target = fn(x, labels)
    assert torch.equal(rows, x) and bool((target.lam == 1).all())


def test_out_video_and_gradients(backend):
    x = torch.randn(4, 2, 3, 8, 8)
    options = {"cutmix_alpha": 1.0, "switch_prob": 1.0}
    out = torch.full((8, 2, 3, 8, 8), float("nan"))
    rows, _ = mk.MixupE(generator=torch.Generator().manual_seed(4), **options)(x, torch.arange(4), out=out)
    assert rows is out
    x.requires_grad_()
    fresh, _ = mk.MixupE(generator=torch.Generator().manual_seed(4), **options)(x, torch.arange(4))
    assert torch.equal(fresh, out)
    (gradient,) = torch.autograd.grad(fresh[:4].sum(), x)
    # Each pixel of the mixed rows is one pixel of x, so the gradient counts them.
    assert gradient.sum().item() == pytest.approx(x.numel())


def test_in_place(backend):
    x, labels = torch.randn(5, 2, 8, 8), torch.arange(5)
    options = {"cutmix_alpha": 1.0, "switch_prob": 1.0, "pairing": "flip"}
    expected, target = mk.Mixup(generator=torch.Generator().manual_seed(4), **options)(x, labels)
    rows, again = mk.Mixup(inplace=True, generator=torch.Generator().manual_seed(4), **options)(x, labels)
    assert rows is x and torch.equal(rows, expected) and torch.equal(again.lam, target.lam)
    assert 0 < target.lam[0] < 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: mk.Mixup(cutmix_alpha=0), ValueError, "cutmix_alpha must be a number > 0, got 0"),
        (lambda x: mk.Mixup(switch_prob=2), ValueError, r"switch_prob must be a number in \[0, 1\]"),
        (
            lambda x: mk.Mixup(cutmix_alpha=1.0, per_sample="pair"),
            ValueError,
            "per_sample must be True or False unless pairing is 'flip'",
        ),
        (
            lambda x: mk.Mixup(pairing="flip", num_samples=3, num_classes=4, per_sample="pair"),
            ValueError,
            "per_sample must be True or False unless pairing is 'flip', without num_samples",
        ),
        (lambda x: mk.Mixup(cutmix_alpha=1.0, num_samples=3), ValueError, "cutmix_alpha must be None with num_samples"),
        (
            lambda x: mk.Mixup(cutmix_alpha=1.0)(x.flatten(1), torch.arange(4)),
            ValueError,
            r"x must have shape \(B, ..., H, W\)",
        ),
        (
            lambda x: mk.Mixup(cutmix_alpha=1.0)((x, x[..., 1:]), torch.arange(4)),
            ValueError,
            "one H and W for all",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 1, 8, 8))


@pytest.mark.parametrize("options", [{}, {"clean_fraction": 1 / 2}, {"clean_fraction": 1 / 4, "split": True}])
@pytest.mark.parametrize("pairing", ["random", "flip"])
@pytest.mark.parametrize("mixer", [mk.Mixup, mk.MixupE])
@pytest.mark.parametrize("per_sample", [False, True])
def test_label_maps_are_cut_with_their_images(options, pairing, mixer, per_sample):
    options = {**(options if mixer is mk.MixupE else {}), "per_sample": per_sample}
    x, labels = torch.randn(8, 3, 9, 7), torch.randint(5, (8, 9, 7))
    x[:, 0] = labels  # what a pixel's class is, in the image
    fn = mixer(cutmix_alpha=1.0, pairing=pairing, generator=torch.Generator().manual_seed(0), **options)
    cut = 0
    for _ in range(8):
        rows, target = fn(x, labels)
        assert target.labels.shape == target.partner_labels.shape == (len(rows), 9, 7)
        lam = target.lam.view(-1, 1, 1)
        torch.testing.assert_close(rows[:, 0], lam * target.labels + (1 - lam) * target.partner_labels)
        cut += bool((target.lam == 1)[0]) and not torch.equal(target.labels[0], target.partner_labels[0])
    assert 0 < cut < 8 or per_sample


def test_label_maps_of_video():
    x, labels = torch.randn(4, 1, 3, 6, 5), torch.randint(5, (4, 3, 6, 5))
    x[:, 0] = labels
    rows, target = mk.Mixup(cutmix_alpha=1.0, switch_prob=1.0)(x, labels)
    assert torch.equal(rows[:, 0], target.labels.float()) and bool((target.lam == 1).all())


def test_label_maps_without_boxes():
    x, labels = torch.randn(6, 4), torch.randint(5, (6, 4))
    x[:] = labels
    rows, target = mk.MixupE(per_sample=True, clean_fraction=1 / 2)(x, labels)
    lam = target.lam.view(-1, 1)
    torch.testing.assert_close(rows, lam * target.labels + (1 - lam) * target.partner_labels)
    torch.testing.assert_close(rows[6:], target.labels[6:].float())


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"cutmix_alpha": 1.0}, (4, 5), r"maps \(B, ..., 8, 8\) of the images' size with cutmix_alpha, got .*\(4, 5\)"),
        ({"cutmix_alpha": 1.0}, (4, 4, 4), r"got int64 of \(4, 4, 4\)"),
        ({"pairing": "same_class"}, (4, 8, 8), r"labels must be .* to pair by class, got \(4, 8, 8\)"),
        ({"pairing": "different_class"}, (4, 3), "labels must be .* to pair by class"),
        ({"num_samples": 3, "num_classes": 5}, (4, 8, 8), "labels must be .* with num_samples > 2"),
    ],
)
def test_label_maps_that_have_no_meaning_are_refused_before_anything_is_drawn(options, shape, message):
    fn = mk.MixupE(generator=torch.Generator().manual_seed(0), **options)
    state = fn.generator.get_state()
    with pytest.raises(ValueError, match=message):
        fn(torch.randn(4, 3, 8, 8), torch.zeros(shape, dtype=torch.int64))
    assert torch.equal(fn.generator.get_state(), state) and fn.steps == 0
