"""From the loader to the model: normalisation, dtypes, memory formats, buffers, and batches of several tensors."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixupe_kernels as mk
from mixupe_kernels.batch import inputs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = ["contiguous", "channels_last", "sliced"]


def images(dtype, layout="contiguous", batch=8, size=(3, 6, 5)):
    wide = (batch, size[0], size[1], size[2] + 2) if layout == "sliced" else (batch, *size)
    x = torch.randint(0, 256, wide, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(wide, dtype=dtype)
    if layout == "sliced":
        return x[..., 1 : size[2] + 1]
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def normalised(x, mean=MEAN, std=STD):
    """torchvision's to_dtype(scale=True) and Normalize, in float64."""
    if mean is None:
        return x.double()
    values = x.double() / 255 if x.dtype == torch.uint8 else x.double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, *[1] * (x.dim() - 2)) for v in (mean, std))
    return (values - mean) / std


def by_hand(draw, values):
    rows = torch.arange(len(values)) if draw.rows is None else draw.rows
    partner = torch.arange(len(values)).flip(0) if draw.partner is None else draw.partner
    lam = draw.lam.double().expand(len(rows)).reshape(-1, *[1] * (values.dim() - 1))
    return lam * values[rows] + (1 - lam) * values[partner]


def call_and_draw(fn, x, labels, **arguments):
    state = fn.generator.get_state()
    draw = fn.draw(labels)
    fn.generator.set_state(state)
    fn.steps -= 1
    return fn(x, labels, **arguments), draw


def tolerance(dtype):
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}


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


def test_a_dict_with_its_labels():
    batch = {
        "pixel_values": images(torch.uint8),
        "features": torch.randn(8, 4),
        "input_ids": torch.arange(16).reshape(8, 2),
        "scale": torch.tensor(2.0),
        "names": list("abcdefgh"),
        "labels": torch.arange(8),
    }
    fn = mk.MixupE(mean=MEAN, std=STD, generator=torch.Generator().manual_seed(0))
    state = fn.generator.get_state()
    draw = fn.draw(batch["labels"])
    fn.generator.set_state(state)
    given = dict(batch)
    rows, target = fn(batch)
    assert batch == given and list(rows) == list(batch)
    assert rows["scale"] is batch["scale"]
    assert torch.equal(rows["input_ids"], batch["input_ids"].repeat(2, 1)) and rows["names"] == list("abcdefgh") * 2
    assert rows["labels"] is target and len(target.lam) == 16
    # One λ and one partner for both tensors; normalisation is for the images.
    torch.testing.assert_close(rows["features"].double(), by_hand(draw, batch["features"].double()))
    expected = by_hand(draw, normalised(batch["pixel_values"]))
    torch.testing.assert_close(rows["pixel_values"].double(), expected, **tolerance(torch.float32))


def test_a_dict_with_labels_apart_keeps_its_entries():
    batch = UserDict(x=torch.randn(4, 2), labels=torch.arange(4), mask=torch.ones(4, dtype=torch.bool))
    rows, target = mk.Mixup()(batch, torch.zeros(4, dtype=torch.int64))
    assert type(rows) is dict and rows["labels"] is batch["labels"] and rows["mask"] is batch["mask"]
    assert bool((target.labels == 0).all())
    _, target = mk.Mixup(labels_key="y")({"x": torch.randn(4, 2), "y": torch.arange(4)})
    assert target.labels.tolist() == [0, 1, 2, 3]


def test_tuples_lists_and_namedtuples():
    Pair = namedtuple("Pair", "image text")
    left, right, labels = torch.randn(4, 2), torch.arange(4), torch.arange(4)
    for x in ((left, right), [left, right], Pair(left, right)):
        rows, target = mk.MixupE()(x, labels)
        assert type(rows) is type(x) and rows[0].shape == (8, 2) and target.num_reg == 4
        assert rows[1].tolist() == [0, 1, 2, 3] * 2
    buffers = (torch.empty(8, 2), torch.empty(8, 3))
    rows, _ = mk.MixupE()((left, torch.randn(4, 3)), labels, out=buffers)
    assert rows[0] is buffers[0] and rows[1] is buffers[1]


@pytest.mark.parametrize(
    "options", [{"clean_fraction": 1 / 4, "split": True}, {"clean_fraction": 1 / 2}, {}, {"regularize": "mixed"}]
)
@pytest.mark.parametrize("many", [{}, {"num_samples": 3, "num_classes": 16}])
def test_entries_follow_the_rows(options, many):
    ids, labels = torch.arange(16), torch.arange(16)
    batch = {
        "x": torch.randn(16, 3),
        "ids": ids,
        "mask": torch.rand(16, 4) < 0.5,
        "names": [str(i) for i in range(16)],
        "pair": tuple(range(16)),
        "array": np.arange(16),
        "scalar": torch.tensor(3.0),
        "table": torch.arange(5),
        "text": "sixteen letters.",
        "labels": labels,
    }
    rows, target = mk.MixupE(generator=torch.Generator().manual_seed(0), **options, **many)(batch)
    own = rows["ids"]
    if options.get("split"):
        assert not torch.equal(own, ids)
    mixed = target.num_mixed
    assert len(own) == len(target.lam) and torch.equal(own[mixed:], target.dense(16).argmax(1)[mixed:])
    if not many:
        assert torch.equal(own, target.labels)
    assert torch.equal(rows["x"][mixed:], batch["x"][own[mixed:]])
    assert torch.equal(rows["mask"], batch["mask"][own])
    assert rows["names"] == [str(int(i)) for i in own] and rows["pair"] == tuple(own.tolist())
    assert rows["array"].tolist() == own.tolist()
    for key in ("scalar", "table", "text"):
        assert rows[key] is batch[key]


def test_follow_chooses():
    batch = {"x": torch.randn(4, 2), "weight": torch.rand(4), "ids": torch.arange(4), "names": list("abcd")}
    rows, _ = mk.MixupE(follow=["weight", "ids"])(batch, torch.arange(4))
    assert torch.equal(rows["weight"], batch["weight"].repeat(2)) and len(rows["ids"]) == 8
    assert rows["names"] is batch["names"]
    rows, _ = mk.MixupE(follow=())(batch, torch.arange(4))
    assert rows["ids"] is batch["ids"]
    rows, _ = mk.Mixup()(batch, torch.arange(4))  # neither permutes nor adds rows
    assert rows["ids"] is batch["ids"]
    rows, _ = mk.MixupE()({**batch, "labels": torch.arange(4)}, torch.zeros(4, dtype=torch.int64))
    assert rows["labels"].tolist() == [0, 1, 2, 3] * 2


def test_keys_choose():
    batch = {"a": torch.randn(4, 2), "b": torch.randn(4, 2), "mask": torch.randint(0, 2, (4, 3), dtype=torch.uint8)}
    labels = torch.arange(4)
    rows, _ = mk.Mixup(keys=["a", "mask"], lam_distribution=mk.sampling.Fixed(0.0), pairing="flip")(batch, labels)
    assert rows["b"] is batch["b"] and torch.equal(rows["a"], batch["a"].flip(0))
    assert torch.equal(rows["mask"], batch["mask"].flip(0))
    rows, _ = mk.Mixup()(batch, labels)
    assert rows["mask"] is batch["mask"]  # two dimensions: no image


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


def test_default_rule_of_what_is_mixed():
    mixed = inputs.mixes_by_default
    assert mixed(torch.zeros(4), 4) and mixed(torch.zeros(4, 1, 1, 1, dtype=torch.uint8), 4)
    for value in (
        torch.zeros(5),
        torch.zeros(()),
        torch.zeros(4).long(),
        torch.zeros(4, 2, dtype=torch.uint8),
        [0.0] * 4,
    ):
        assert not mixed(value, 4)
