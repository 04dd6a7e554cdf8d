"""MixedTarget as the tuple, the pytree and the container of rows that training loops take it for."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

import mixupe_kernels as mk

FIELDS = ("labels", "partner_labels", "lam", "num_mixed", "num_reg", "reg_weight")


def target_of(rows=12, num_mixed=8, num_reg=4, soft=False, reg_weight=0.25):
    labels = torch.randint(3, (rows,))
    partner = labels.flip(0)
    if soft:
        labels, partner = (torch.nn.functional.one_hot(value, 3).float() for value in (labels, partner))
    return mk.MixedTarget(labels, partner, torch.rand(rows), num_mixed, num_reg, reg_weight)


def assert_same(ours, expected):
    assert type(ours) is mk.MixedTarget
    for field in FIELDS:
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field), rtol=0, atol=0)


REBUILT = {
    "generator": lambda t: type(t)(value for value in t),
    "list": lambda t: type(t)([*t]),
    "fields": lambda t: type(t)(*t),
    "names": lambda t: type(t)(**t._asdict()),
    "_make": lambda t: type(t)._make(t),
    "_replace": lambda t: t._replace(num_reg=3)._replace(num_reg=t.num_reg),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "tree_map": lambda t: pytree.tree_map(lambda value: value, t),
    "collated": lambda t: pytree.tree_map(lambda value: value[0], default_collate([t, t]))._replace(
        num_mixed=8, num_reg=4
    ),
    "to": lambda t: t.to("cpu"),
    "pinned": lambda t: torch.utils.data._utils.pin_memory.pin_memory(t, None) if torch.cuda.is_available() else t,
}


@pytest.mark.parametrize("how", REBUILT)
@pytest.mark.parametrize("soft", [False, True])
def test_containers_keep_it(how, soft):
    target = target_of(soft=soft, reg_weight=torch.tensor(0.25))
    assert_same(REBUILT[how](target), target)


def test_saved_with_weights_only():
    target = target_of(reg_weight=torch.tensor(0.25))
    file = io.BytesIO()
    torch.save({"target": target}, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True)["target"], target)


def test_a_wrong_number_of_fields_is_refused():
    for arguments in ((), (1, 2), ([1, 2, 3],), (torch.zeros(6),)):
        with pytest.raises(TypeError, match="argument"):
            mk.MixedTarget(*arguments)


def test_it_is_a_tuple_of_six_that_knows_its_rows():
    target = target_of(soft=True)
    labels, partner_labels, lam, num_mixed, num_reg, reg_weight = target
    assert labels is target.labels and (num_mixed, num_reg, reg_weight) == target[3:] and partner_labels is target[1]
    assert len(target) == 6 and target._fields == FIELDS and lam is target.lam
    assert target.shape == (12, 3) and target.num_rows == 12


def honor_type(value, elements):
    """accelerate's way to rebuild a tuple."""
    return type(value)(*elements) if hasattr(value, "_fields") else type(value)(elements)


def sliced(value, part):
    """As accelerate slices a batch that one process dispatches to all."""
    if isinstance(value, tuple):
        return honor_type(value, (sliced(element, part) for element in value))
    return value[part] if isinstance(value, torch.Tensor) and value.dim() else value


def concatenated(values):
    """As accelerate joins such batches, by the number of their entries."""
    if isinstance(values[0], tuple):
        return honor_type(values[0], (concatenated([v[i] for v in values]) for i in range(len(values[0]))))
    if not isinstance(values[0], torch.Tensor):
        raise TypeError(f"Can only concatenate tensors but got {type(values[0])}")
    return torch.cat(values)


def test_code_that_knows_fields_alone_keeps_the_type_and_leaves_the_counts():
    target = target_of()
    assert_same(sliced(target, slice(0, 12)), target)
    part = sliced(target, slice(0, 5))
    assert type(part) is mk.MixedTarget and part.num_rows == 5
    with pytest.raises(ValueError, match=r"num_mixed must be in \[0, 5\], got 8"):
        mk.mixupe_loss(torch.randn(5, 3), part, eta=0.1)
    with pytest.raises(TypeError, match="only concatenate tensors"):
        concatenated([target, target])


@pytest.mark.parametrize("counts", [(8, 4), (12, 12), (12, 0), (9, 3)])
def test_rows_are_a_slice(counts):
    target = target_of(12, *counts)
    carries_mix, carries_reg = torch.arange(12) < counts[0], torch.arange(12) >= 12 - counts[1]
    for start, stop in ((0, 12), (0, 5), (3, 10), (9, None), (-2, None), (5, 5), (7, 3), (0, 99), (12, 14)):
        part = target.rows(start, stop)
        for name in ("labels", "partner_labels", "lam"):
            assert torch.equal(getattr(part, name), getattr(target, name)[start:stop])
        assert part.num_mixed == carries_mix[start:stop].sum() and part.num_reg == carries_reg[start:stop].sum()
        assert type(part) is mk.MixedTarget and part.reg_weight == target.reg_weight


def test_cat_undoes_rows():
    for target in (target_of(), target_of(12, 12, 12), target_of(12, 12, 0, soft=True)):
        assert_same(mk.MixedTarget.cat(target.rows(*bounds) for bounds in ((0, 5), (5, 8), (8, 12))), target)
    mixed = target_of(12, 12, 0)
    assert_same(mk.MixedTarget.cat([mixed.rows(0, 4), mixed.rows(4)]), mixed)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], ValueError, "targets must hold at least one"),
        ([1], TypeError, "targets must be MixedTargets, got int"),
        ([target_of(), target_of()], ValueError, "targets must have mixed rows first"),
        ([target_of(12, 12, 12), target_of(12, 12, 0)], ValueError, "targets must have mixed rows first"),
        ([target_of(4, 4, 4), target_of(4, 4, 4, reg_weight=0.5)], ValueError, "one reg_weight, got 0.25 and 0.5"),
    ],
)
def test_cat_refuses_what_is_no_batch(targets, error, message):
    with pytest.raises(error, match=message):
        mk.MixedTarget.cat(targets)


MOVES = {
    "dtype": ((torch.float64,), {}),
    "device": (("cpu",), {}),
    "device and dtype": ((torch.device("cpu"), torch.float16), {"non_blocking": True}),
    "device, dtype, flags": (("cpu", torch.bfloat16, True, True), {}),
    "another tensor": ((torch.zeros(1, dtype=torch.float64),), {}),
    "copy": ((torch.float32,), {"copy": True}),
    "names": ((), {"device": "meta", "dtype": torch.float64}),
}


@pytest.mark.parametrize("how", MOVES)
def test_to_moves_as_tensors_do(how):
    args, kwargs = MOVES[how]
    target = target_of(reg_weight=torch.tensor(0.25))
    moved = target.to(*args, **kwargs)
    for field in ("labels", "partner_labels", "lam", "reg_weight"):
        before, after = getattr(target, field), getattr(moved, field)
        expected = before.float().to(*args, **kwargs)
        assert after.device == expected.device
        assert after.dtype == (expected.dtype if before.is_floating_point() else before.dtype)
        if "copy" in kwargs or len(args) == 4:
            assert after.data_ptr() != before.data_ptr()
    assert (moved.num_mixed, moved.num_reg) == (8, 4)


def test_compiled_once_for_all_batch_sizes():
    seen = []

    def backend(module, _):
        seen.append(module)
        return module.forward

    @torch.compile(backend=backend, fullgraph=True)
    def rows(target):
        labels, partner_labels, lam, *_, reg_weight = target._replace(reg_weight=target.reg_weight * 2)
        return mk.MixedTarget(labels, partner_labels, lam * labels.shape[0], 8, 4, reg_weight)

    for size in (12, 13, 14, 15, 16):
        target = target_of(size, reg_weight=torch.tensor(0.25))
        assert_same(rows(target), target._replace(lam=target.lam * size, reg_weight=torch.tensor(0.5)))
    assert len(seen) <= 2
