"""Batches of several tensors: dicts, tuples and lists, which of their entries are mixed and which follow the rows."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels.batch import inputs

from .batches import MEAN, STD, by_hand, images, normalised, tolerance


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
