"""From the loader to the model: normalisation, dtypes, memory formats, buffers, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixupe_kernels as mk

from .batches import MEAN, STD, by_hand, call_and_draw, images, normalised, tolerance

LAYOUTS = ["contiguous", "channels_last", "sliced"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"clean_fraction": 1 / 2, "split": True}, {"regularize": "mixed", "pairing": "flip"}]
)
def test_normalise_mix_and_cast(layout, x_dtype, dtype, options, backend):
    x, labels = images(x_dtype, layout), torch.arange(8)
    generator = torch.Generator().manual_seed(0)
    fn = mk.MixupE(0.5, mean=MEAN, std=STD, dtype=dtype, per_sample=True, generator=generator, **options)
    (rows, target), draw = call_and_draw(fn, x, labels)
    expected_dtype = dtype or (torch.float32 if x_dtype == torch.uint8 else x_dtype)
    assert rows.dtype == expected_dtype and len(rows) == len(target.lam)
    torch.testing.assert_close(rows.double(), by_hand(draw, normalised(x)), **tolerance(expected_dtype))
    assert rows.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format(x_dtype, wanted, layout, backend):
    fn = mk.MixupE(memory_format=wanted, generator=torch.Generator().manual_seed(0))
    x = images(x_dtype, layout)
    (rows, _), draw = call_and_draw(fn, x, torch.arange(8))
    assert rows.is_contiguous(memory_format=wanted)
    expected = by_hand(draw, normalised(x, None))
    if x_dtype == torch.uint8:
        expected = expected.round()
    assert rows.dtype == x_dtype
    torch.testing.assert_close(rows.double(), expected, **tolerance(torch.float32))
    fn.enabled = False
    plain, _ = fn(x, torch.arange(8))
    assert plain.is_contiguous(memory_format=wanted) and plain.dtype == x_dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clean_fraction": 1 / 2},
        {"split": True, "clean_fraction": 1 / 4, "per_sample": True},
        {"regularize": "mixed", "pairing": "flip"},
    ],
)
def test_uint8_stays_uint8_for_what_normalises_afterwards(layout, options, backend):
    x = images(torch.uint8, layout)
    fn = mk.MixupE(0.5, generator=torch.Generator().manual_seed(0), **options)
    (rows, target), draw = call_and_draw(fn, x, torch.arange(8))
    expected = by_hand(draw, x.double())
    assert rows.dtype == torch.uint8 and bool(((rows - expected).abs() <= 0.5 + 1e-4).all())
    assert torch.equal(rows[target.num_mixed :].double(), expected[target.num_mixed :])  # clean rows, exactly
    buffer = torch.zeros(fn.num_rows(8), 3, 6, 5, dtype=torch.uint8)
    again = mk.MixupE(0.5, generator=torch.Generator().manual_seed(0), **options)
    written, _ = again(x, torch.arange(8), out=buffer)
    assert written.data_ptr() == buffer.data_ptr() and torch.equal(written, rows)
    with pytest.raises(TypeError, match="out must have dtype uint8, got float32"):
        again(x, torch.arange(8), out=buffer.float())


def test_uint8_in_place_with_boxes_and_of_many(backend):
    x, labels = images(torch.uint8), torch.arange(8)
    options = {"pairing": "flip", "lam_distribution": mk.sampling.Fixed(0.25)}
    expected = (0.25 * x.double() + 0.75 * x.double().flip(0)).round()
    memory = x.clone()
    rows, _ = mk.Mixup(inplace=True, **options)(memory, labels)
    assert rows is memory and torch.equal(rows.double(), expected)
    rows, target = mk.Mixup(cutmix_alpha=1.0, switch_prob=1.0)(x, labels)
    assert rows.dtype == torch.uint8 and 0 < target.lam[0] < 1
    rows, _ = mk.Mixup(num_samples=3, num_classes=8)(x, labels)
    assert rows.dtype == torch.uint8 and 50 < rows.float().mean() < 200


def test_video_in_channels_last_3d(backend):
    x = torch.randint(0, 256, (4, 3, 2, 5, 5), dtype=torch.uint8)
    fn = mk.Mixup(mean=MEAN, std=STD, memory_format=torch.channels_last_3d, pairing="flip", prob=0.0)
    rows, _ = fn(x, torch.arange(4))
    assert rows.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(rows.double(), normalised(x), **tolerance(torch.float32))


@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("options", [{"mean": MEAN, "std": STD}, {"dtype": torch.bfloat16}, {}])
def test_plain_samples_are_normalised_and_cast(x_dtype, options, backend):
    x, labels = images(x_dtype), torch.arange(8)
    fn = mk.MixupE(**options)
    fn.enabled = False
    for rows, target in (fn(x, labels), mk.MixupE(**options).plain(x, labels)):
        assert (target.num_mixed, target.num_reg) == (8, 0) and target.labels is labels
        expected = normalised(x, options.get("mean"))
        if x_dtype == torch.uint8 and "dtype" in options:
            expected = expected / 255
        torch.testing.assert_close(rows.double(), expected, **tolerance(options.get("dtype", torch.float32)))
    if x_dtype == torch.uint8 and not options:
        return
    out = torch.full((11, 3, 6, 5), float("nan"), dtype=options.get("dtype"))
    with pytest.raises(
        ValueError, match="out must have shape"
    ):  # the rows of a mixed batch, so that a schedule can start
        fn(x, labels, out=out)
    buffer = torch.full((16, 3, 6, 5), float("nan"), dtype=options.get("dtype"))
    written, _ = fn(x, labels, out=buffer)
    assert written.data_ptr() == buffer.data_ptr() and torch.equal(written, rows) and bool(buffer[8:].isnan().all())


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 5),
    trailing=st.lists(st.integers(1, 5), max_size=3),
    batch=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_any_shape_with_channels(channels, trailing, batch, seed):
    x = torch.randint(0, 256, (batch, channels, *trailing), dtype=torch.uint8)
    mean, std = torch.rand(channels).tolist(), (torch.rand(channels) + 0.1).tolist()
    fn = mk.MixupE(mean=mean, std=std, generator=torch.Generator().manual_seed(seed))
    state = fn.generator.get_state()
    draw = fn.draw(torch.arange(batch))
    fn.generator.set_state(state)
    rows, _ = fn(x, torch.arange(batch))
    expected = by_hand(draw, normalised(x, mean, std)) if batch else normalised(x, mean, std)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-5)


def test_out_is_reused_and_written_in_full(backend):
    x, labels = images(torch.float32), torch.arange(8)
    buffer = torch.empty(16, 3, 6, 5)
    for options in ({}, {"clean_fraction": 1 / 2}, {"split": True, "clean_fraction": 1 / 4}, {"regularize": "mixed"}):
        buffer.fill_(float("nan"))
        fresh, _ = mk.MixupE(generator=torch.Generator().manual_seed(1), **options)(x, labels)
        rows, target = mk.MixupE(generator=torch.Generator().manual_seed(1), **options)(x, labels, out=buffer)
        assert rows.data_ptr() == buffer.data_ptr() and len(rows) == len(target.lam)
        assert torch.equal(rows, fresh)
        assert bool(buffer[len(rows) :].isnan().all())


@pytest.mark.parametrize("options", [{}, {"clean_fraction": 1 / 2}, {"dtype": torch.float32}])
def test_a_graph_that_saved_the_buffer_raises(options, backend):
    x, labels = images(torch.float32), torch.arange(8)
    weight = torch.ones((), requires_grad=True)
    fn = mk.MixupE(**options)
    buffer = torch.empty(fn.num_rows(8), 3, 6, 5)
    rows, _ = fn(x, labels, out=buffer)
    loss = (weight * rows).sum()
    fn(x, labels, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    rows, _ = mk.Mixup(pairing="flip", inplace=True)(x, labels)
    loss = (weight * rows).sum()
    mk.Mixup(pairing="flip", inplace=True)(rows, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_of_another_format_or_dtype(backend):
    x, labels = images(torch.uint8), torch.arange(8)
    out = torch.empty(16, 3, 6, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    fn = mk.MixupE(mean=MEAN, std=STD, generator=torch.Generator().manual_seed(0))
    (rows, _), draw = call_and_draw(fn, x, labels, out=out)
    assert rows is out
    torch.testing.assert_close(rows.double(), by_hand(draw, normalised(x)), **tolerance(torch.bfloat16))


def test_in_place(backend):
    x, labels = images(torch.float32), torch.arange(8)
    for make in (mk.Mixup, lambda *args, **options: mk.MixupE(*args, regularize="mixed", **options)):
        options = {"pairing": "flip", "per_sample": True, "mean": MEAN, "std": STD}
        fresh, _ = make(generator=torch.Generator().manual_seed(1), **options)(x, labels)
        memory = x.clone()
        rows, _ = make(generator=torch.Generator().manual_seed(1), inplace=True, **options)(memory, labels)
        assert rows is memory and torch.equal(rows, fresh)


def test_gradients_through_normalisation(backend):
    x = images(torch.float64).requires_grad_()
    fn = mk.MixupE(mean=MEAN, std=STD, generator=torch.Generator().manual_seed(0))
    (rows, _), draw = call_and_draw(fn, x, torch.arange(8))
    weight = torch.randn_like(rows)
    ours, expected = (torch.autograd.grad((r * weight).sum(), x)[0] for r in (rows, by_hand(draw, normalised(x))))
    torch.testing.assert_close(ours, expected)


def test_compiles_from_uint8():
    x, labels = images(torch.uint8), torch.arange(8)
    fn = mk.MixupE(mean=MEAN, std=STD, pairing="flip", lam_distribution=mk.sampling.Fixed(0.25))
    torch._dynamo.reset()
    rows, _ = torch.compile(fn, fullgraph=True, backend="aot_eager")(x, labels)
    expected = torch.cat([0.25 * normalised(x) + 0.75 * normalised(x).flip(0), normalised(x)])
    torch.testing.assert_close(rows.double(), expected, **tolerance(torch.float32))


Y = torch.arange(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: mk.Mixup(mean=MEAN), ValueError, "mean and std must be given together"),
        (lambda x: mk.Mixup(mean=MEAN, std=(1.0,)), ValueError, r"std must have as many values as mean \(3\), got 1"),
        (lambda x: mk.Mixup(mean=MEAN, std=(0, 1, 1)), ValueError, r"std\[0\] must be a number > 0, got 0"),
        (lambda x: mk.Mixup(mean=0.5, std=0.5), TypeError, "mean must be a sequence of numbers"),
        (lambda x: mk.Mixup(dtype=torch.int64), ValueError, "dtype must be float32"),
        (lambda x: mk.Mixup(memory_format=torch.preserve_format), ValueError, "memory_format must be"),
        (lambda x: mk.Mixup(mean=(0.0,), std=(1.0,))(x, Y), ValueError, r"x must have shape \(B, 1, ...\)"),
        (
            lambda x: mk.Mixup(memory_format=torch.channels_last)(x[..., 0], Y),
            ValueError,
            "x must have 4 or 5 dimensions",
        ),
        (lambda x: mk.Mixup(inplace=True), ValueError, "inplace must be False unless pairing is 'flip'"),
        (lambda x: mk.MixupE(inplace=True, pairing="flip"), ValueError, "regularize must be 'mixed' with inplace"),
        (
            lambda x: mk.Mixup(inplace=True, pairing="flip", dtype=torch.float16)(x, Y),
            ValueError,
            "x must have dtype torch.float16 with inplace",
        ),
        (
            lambda x: mk.Mixup(inplace=True, pairing="flip")(x.clone().requires_grad_(), Y),
            ValueError,
            "x must not require a gradient with inplace",
        ),
        (lambda x: mk.Mixup(inplace=True, pairing="flip")(x, Y, out=x), ValueError, "out must be None with inplace"),
        (
            lambda x: mk.Mixup()(x.clone().requires_grad_(), Y, out=x.clone()),
            ValueError,
            "x must not require a gradient",
        ),
        (
            lambda x: mk.Mixup()(x, Y, out=torch.empty_like(x).requires_grad_()),
            ValueError,
            "out must not require a gradient",
        ),
        (
            lambda x: mk.Mixup()({"x": x, "labels": Y}, out={"x": torch.empty_like(x).requires_grad_()}),
            ValueError,
            r"out\['x'\] must not require a gradient",
        ),
        (lambda x: mk.MixupE()(x, Y, out=x.clone()), ValueError, r"out must have shape \(>= 16, 3, 6, 5\), got \(8, 3"),
        (lambda x: mk.Mixup()(x, Y, out=[1]), TypeError, "out must be a torch.Tensor, got list"),
        (lambda x: mk.Mixup()(x, Y, out=x.long()), TypeError, "out must have dtype float32"),
        (lambda x: mk.Mixup(dtype=torch.float16)(x, Y, out=x.clone()), TypeError, "out must have dtype float16"),
        (
            lambda x: mk.Mixup(num_samples=3, num_classes=8)(x, Y, out=x.clone()),
            ValueError,
            "out must be None with num_s",
        ),
        (lambda x: mk.Mixup()(x, Y, out=x), ValueError, "out must not overlap x"),
        (lambda x: mk.Mixup(keys="pixels"), TypeError, "keys must be a sequence of keys"),
        (lambda x: mk.Mixup(follow=3), TypeError, "follow must be a sequence of keys or None, got int 3"),
        (lambda x: mk.Mixup(keys=["x"], follow=["x"]), ValueError, "follow must name other entries than keys, got 'x'"),
        (
            lambda x: mk.MixupE(follow=["y"])({"x": x, "labels": Y}),
            ValueError,
            r"follow must name entries of x \('x', 'labels'\), got 'y'",
        ),
        (
            lambda x: mk.MixupE(follow=["s"])({"x": x, "s": 1, "labels": Y}),
            ValueError,
            r"x\['s'\] must have 8 rows to follow them",
        ),
        (
            lambda x: mk.MixupE()({"x": x, "ids": Y.to("meta"), "labels": Y}),
            ValueError,
            r"x\['ids'\] must be on the device of labels, cpu, to follow the rows, got meta",
        ),
        (
            lambda x: mk.Mixup(keys=["y"])({"x": x, "labels": Y}),
            ValueError,
            r"keys must name entries of x \('x', 'labels'\)",
        ),
        (lambda x: mk.Mixup(keys=["x"])({"x": x[1:]}, Y), ValueError, r"x\['x'\] must have 8 rows"),
        (lambda x: mk.Mixup()({"x": x}), ValueError, "labels must be given, or be the entry 'labels' of x"),
        (lambda x: mk.Mixup()((x, Y)), TypeError, "labels must be a torch.Tensor"),
        (lambda x: mk.Mixup()({"x": x, "labels": Y[1:]}), ValueError, "x must hold a floating-point tensor"),
        (lambda x: mk.Mixup()({"x": x, "labels": Y.float()}), ValueError, "soft labels must have shape"),
        (lambda x: mk.Mixup()({"x": x, "labels": Y}, out={}), ValueError, "out must have a buffer for each of 'x'"),
        (lambda x: mk.Mixup()({"x": x, "labels": Y}, out=x), TypeError, "out must be a tuple, list or dict"),
    ],
)
def test_errors(call, error, message):
    if "overlap" in message and "cpp" not in mk.available_backends():
        pytest.skip("only the compiled backends see the overlap: the reference makes a tensor of its own first")
    with pytest.raises(error, match=message):
        call(images(torch.float32))
