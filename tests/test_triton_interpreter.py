"""What is Triton's own: launches, the launch table, autotuning, splits, and values out of range, by the interpreter.

The operators' suite (tests/ops) runs on the interpreted kernels in the same process as this, one with TRITON_INTERPRET=1 in
its environment; elsewhere these tests skip themselves.
"""

import os

import pytest
import torch

import mixupe_kernels as mk
from tests.cases import TARGETS, check, make_logits, make_target, thorough
from tests.ops.test_mixupe_loss import check_mixupe_loss

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)
pytest.importorskip("triton")

import triton.runtime.interpreter

from mixupe_kernels.ops.triton import KERNELS, launch

ops = torch.ops.mixupe
pytestmark = pytest.mark.usefixtures("backend")  # which is Triton in this process


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched so far."""
    names = []
    executor = triton.runtime.interpreter.GridExecutor
    call = executor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", counted)
    return names


def check_entropy(logits, target, smoothing=0.0):
    options = (*target, None, smoothing)
    _, *saved = check("ce_entropy", logits, *options)
    check(
        "ce_entropy_backward",
        *torch.ones(2, logits.shape[0], dtype=saved[0].actual.dtype),
        None,
        logits,
        *saved,
        *options,
    )


def test_every_operator_has_its_kernels():
    by_torch = {"normalise_apart", "normalise_apart_backward"}  # PyTorch's own kernels, on parts
    assert set(KERNELS) | by_torch == set(mk.ops.operators())


# Classes of rows that are split, each part a loop: tiles of dense targets are shorter, and their gradient takes its time.
LONG = {"index": 20003, "mixed": 20003, "dense": 9003}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_split_and_looped(kind, dtype, launches, monkeypatch):
    shape = (2, LONG[kind])
    logits, target = make_logits(shape, dtype), make_target(kind, shape, dtype)
    check_entropy(logits, target, smoothing=0.1)
    assert launches.count("merge_stats") == 1
    monkeypatch.setattr(launch, "PROGRAMS", 1)
    check_entropy(logits, target)
    assert launches.count("merge_stats") == 1


SHARED = [("mixed", 100), ("index", 1001), *thorough(*((kind, n) for kind in TARGETS for n in (101, 1000, 2500)))]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_rows_that_share_a_warp(case, monkeypatch):
    """What batches of ``MANY`` rows get; the operators' suite has smaller ones, a warp or more for each row."""
    monkeypatch.setattr(launch, "MANY", 1)
    kind, columns = case
    shape = (18, columns)
    logits, target = make_logits(shape, torch.bfloat16), make_target(kind, shape, torch.bfloat16)
    logits[1, 7:], logits[2, :-1] = -torch.inf, -torch.inf
    check_entropy(logits, target, smoothing=0.1 if columns % 2 else 0.0)
    # Columns of a batch that begin at an odd address, and a stride of their own.
    logits = make_logits((18, columns + 1), torch.bfloat16)[:, 1:]
    check_mixupe_loss(logits, target, (16, 12), smoothing=0.1 if columns % 2 else 0.0, gamma=0.25)


@pytest.mark.parametrize("kind", TARGETS)
def test_split_rows_take_three_launches_and_one(kind, launches):
    shape = (3, LONG[kind])
    logits, target = make_logits(shape, torch.float32), make_target(kind, shape, torch.float32)
    eta, grad = torch.tensor(0.3), torch.tensor(1.0)
    _, *saved = ops.mixupe_loss(logits, *target, eta, eta, 2, 1)
    assert launches == ["row_stats", "merge_stats", "loss_total"]
    ops.mixupe_loss_backward(grad, logits, *target, *saved, 2)
    assert launches[3:] == ["row_gradient"]


def test_launch_counts(launches):
    logits, target = make_logits((8, 33), torch.float32), make_target("mixed", (8, 33), torch.float32)
    eta, grad, x = torch.tensor(0.3), torch.tensor(1.0), torch.randn(4, 3, 8, 8)
    _, *saved = ops.mixupe_loss(logits, *target, eta, eta, 4, 4, clean_weight=0.25)
    ops.mixupe_loss_backward(grad, logits, *target, *saved, 4)
    assert launches == ["row_stats", "loss_total", "row_gradient"]
    launches.clear()
    ops.mix(x, torch.randperm(4), torch.tensor(0.3), torch.tensor([0, 1, 2, 3]))
    ops.mix(x, None, torch.tensor(0.3))
    assert launches == ["mix_rows", "mix_pairs"]


@pytest.mark.parametrize("kind", TARGETS)
def test_empty_batch(kind, launches):
    logits, target = torch.empty(0, 5), make_target(kind, (0, 5), torch.float32)
    eta = torch.tensor(0.3)
    loss, parts, *saved = ops.mixupe_loss(logits, *target, eta, eta, 0, 0)
    assert loss == 0 and torch.equal(parts, torch.tensor([0.0, 0, 0, 1, 0, 0, 0]))
    assert ops.mixupe_loss_backward(eta, logits, *target, parts, *saved, 0).shape == (0, 5)
    assert launches == ["loss_total"]


def test_nothing_synchronises(monkeypatch):
    logits, target = make_logits((4, 33), torch.float32), make_target("mixed", (4, 33), torch.float32)
    eta, x, index = torch.tensor(0.3), torch.randn(4, 70), torch.tensor([1, 0, 3, 2])
    offsets, lam = torch.arange(5), torch.tensor([0.0, 1, 0.3, 0.6])

    def refused(*args, **kwargs):
        raise AssertionError("a value was read back from the device")

    for method in ("item", "nonzero", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, method, refused)
    _, *saved = ops.mixupe_loss(logits, *target, eta, eta, 2, 2)
    ops.mixupe_loss_backward(eta, logits, *target, *saved, 2)
    ce, entropy, lse = ops.ce_entropy(logits, *target)
    ops.ce_entropy_backward(ce, None, None, logits, entropy, lse, *target)
    ops.mix(x, index, lam, index)
    ops.mix_out(x, None, lam, out=x)
    ops.mix(x.view(4, 7, 10), index, lam, box=torch.tensor([1, 4, 0, 5]))
    ops.gather_sum(x, index, lam, offsets)
    ops.row_dot(x, x, index, index)


# Values out of range are not read: they make their row or sample NaN


@pytest.mark.parametrize("columns", [40, 1001, 9001])
@pytest.mark.parametrize("kind", TARGETS)
def test_nan_and_labels_out_of_range_stay_in_their_row(columns, kind):
    logits = make_logits((4, columns), torch.float32)
    target = make_target(kind, logits.shape, torch.float32)
    clean = ops.ce_entropy(logits, *target)
    bad = logits.clone()
    bad[1, 3], bad[2] = torch.nan, -torch.inf
    for label in (None,) if kind == "dense" else (-1, columns, 1 << 40):
        if label is not None:
            target[0][3] = label
        outputs = ops.ce_entropy(bad, *target)
        ones = torch.ones(4)
        gradient = ops.ce_entropy_backward(ones, ones, ones, bad, *outputs[1:], *target)
        assert all(torch.equal(one[:1], other[:1]) for one, other in zip(outputs, clean, strict=True))
        assert gradient[0].isfinite().all() and gradient[1:3].isnan().all()
        assert all(output[1:3].isnan().all() for output in outputs)
        if label is not None:
            assert outputs[0][3].isnan() and outputs[1][3].isfinite() and gradient[3].isnan().all()


def test_label_out_of_range_makes_the_loss_nan():
    logits, eta = make_logits((8, 33), torch.float32), torch.tensor(0.1)
    for row in (0, 7):
        labels = torch.zeros(8, dtype=torch.int64)
        labels[row] = 33
        assert ops.mixupe_loss(logits, labels, None, None, eta, eta, 4, 4)[0].isnan()


def test_mixed_target_of_rows_out_of_range_has_a_lam_of_nan():
    labels, lam = torch.arange(3), torch.rand(3)
    for rows, partner in (([0, 3, 2, -1], [0, 1, 2]), ([0, 1, 2, 1], [0, 5, 2])):
        own_lam, *_ = ops.mixed_target(labels, torch.tensor(partner), lam, torch.tensor(rows), 4)
        assert own_lam.isnan().tolist() == [False, True, False, True]


def test_values_out_of_range_make_their_sample_nan():
    x, index = torch.randn(3, 50), torch.tensor([1, 0, 2])
    for bad in (-1, 3, 1 << 40):
        broken = torch.tensor([0, bad, 2])
        half = torch.tensor(0.5)
        mixed = (ops.mix(x, broken, half), ops.mix(x, index, half, broken))
        sums = ops.gather_sum(x, broken, torch.ones(3), torch.arange(4))
        dots = (ops.row_dot(x, x, broken, index), ops.row_dot(x, x, index, broken))
        for result in (*mixed, sums, *dots):
            assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
    assert ops.mix(x, index, torch.tensor([0.5, 1.1, 0.5]))[1].isnan().all()
    pairs = ops.mix(x, None, torch.tensor([-0.1, 0.5, 0.5]))
    assert pairs[0].isnan().all() and pairs[1:].isfinite().all()
    images, box = x.view(3, 5, 10), torch.tensor([0, 5, 0, 10])
    mixed = ops.mix(images, torch.tensor([1, 3, 2]), torch.tensor(0.5), box=box)
    assert mixed.isnan().any((1, 2)).tolist() == [False, True, False]
    pairs = ops.mix(images, None, torch.tensor([-0.1, 0.5, 0.5]), box=box)
    assert pairs.isnan().any((1, 2)).tolist() == [True, False, False]


# The launch table


def entries():
    for family, tables in launch.TABLE.items():
        for dtype, table in tables.items():
            shorter = 0
            for longest in sorted(table):
                yield pytest.param(family, dtype, shorter + 1, id=f"{family}-{dtype}-{shorter + 1}")
                shorter = longest


@pytest.mark.parametrize(("family", "dtype", "length"), list(entries()))
def test_every_entry_of_the_launch_table(family, dtype, length, monkeypatch):
    used = []
    tile_for = launch.tile_for
    monkeypatch.setattr(launch, "tile_for", lambda *args: used.append((args, tile_for(*args))) or used[-1][1])
    narrow = family.endswith(("_narrow", "_placed"))
    table, dtype = launch.TABLE[family][dtype], torch.bfloat16 if narrow else dtype
    if family == "mix_placed":
        length = max(length + 1, 256)  # of an even number of pixels, and not too short for a plane
    elif family in ("mix_cut", "mix_cut_narrow"):
        length += 15  # whole packs
    x, index = torch.randn(3, length, dtype=dtype), torch.tensor([1, 2, 0])
    if family == "mix_placed":
        images = torch.randn(3, 2, 2, length // 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
        check("mix", images, index, torch.tensor(0.3), *[None] * 4, torch.contiguous_format, None)
    elif family.startswith("mix_cut"):
        box = torch.tensor([0, 1, length // 3, length])
        check("mix", x.view(3, 1, 1, length), index, torch.tensor(0.3), *[None] * 5, box)
    elif family.startswith("mix"):
        check("mix", x, index, torch.tensor(0.3, dtype=launch.accumulate_dtype(dtype)))
    elif family == "sum":
        check("row_dot", x, x, index, index)
        check("gather_sum", x, index, torch.rand(3, dtype=dtype), torch.arange(4))
    else:
        targets = x.softmax(1) if family.endswith(("_dense", "_summed")) else index.clamp(max=length - 1)
        check_entropy(x, (targets, None, None))
    expected = table[min(longest for longest in table if longest >= length)]
    assert ((family, dtype, length), expected) in used


def test_neighbours_try_other_stages_of_a_loop_only():
    tile = launch.tile_for("row_stats", torch.float32, 5000)
    plain, looped = (list(launch.neighbours(tile, looped)) for looped in (False, True))
    assert plain == looped[: len(plain)] and {other.stages for other in plain} == {tile.stages}
    assert {other.stages for other in looped} == set(launch.STAGES)
    assert all(other == tile._replace(stages=other.stages) for other in looped[len(plain) :])


@pytest.mark.parametrize("length, tiles", [(20000, 7), (3000, 5)])
def test_autotuning_of_rows_tries_stages_where_they_loop(monkeypatch, length, tiles):
    monkeypatch.setenv("MIXUPE_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_tuned", {})
    timed = []
    monkeypatch.setattr(triton.testing, "do_bench", lambda run: timed.append(run()) or len(timed))
    ops.ce_entropy(torch.randn(3, length), torch.tensor([0, 1, 2]))
    tile = launch.spread(launch.tile_for("row_stats", torch.float32, length), 3, length)
    assert len(timed) == tiles and list(launch._tuned.values()) == [tile]


def test_autotuning_takes_the_fastest_neighbour(monkeypatch, capsys):
    monkeypatch.setenv("MIXUPE_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_tuned", {})
    timed = []

    def do_bench(run):
        run()
        timed.append(run)
        return -len(timed)  # the last one is the fastest

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    x, lam = torch.randn(3, 600), torch.tensor(0.3)
    expected = lam * x + (1 - lam) * x.flip(0)
    for _ in range(2):
        torch.testing.assert_close(ops.mix(x, None, lam), expected)
    *_, last = launch.neighbours(launch.tile_for("mix", torch.float32, 600), looped=False)
    assert len(timed) == 5 and list(launch._tuned.values()) == [last]
    assert str(last) in capsys.readouterr().out
    ops.mix_out(x, None, lam, out=x)  # in place, a second run would mix twice
    assert len(timed) == 5
    torch.testing.assert_close(x, expected)
