"""Pairings: the properties that define each one, that a seed decides, and who is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import mixupe_kernels as mk
from mixupe_kernels import pairing

CPU = torch.device("cpu")
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def pair(name, size, seed=0, labels=None, ids=None):
    partner = pairing.as_pairing(name)(size, torch.Generator().manual_seed(seed), CPU, labels, ids)
    assert partner.dtype == torch.int64 and partner.shape == (size,)
    assert bool(((partner >= 0) & (partner < size)).all())
    return partner


def is_permutation(partner):
    return torch.equal(partner.sort().values, torch.arange(len(partner)))


def labels_of(size, classes, seed):
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


@given(size=sizes, seed=seeds)
def test_permutations(size, seed):
    labels = labels_of(size, 3, seed)
    for name in ("random", "flip", "roll", "derangement", "same_class"):
        assert is_permutation(pair(name, size, seed, labels)), name


def test_flip_is_timms_and_roll_is_torchvisions():
    x = torch.randn(7, 3)
    torch.testing.assert_close(x[pair("flip", 7)], x.flip(0))
    torch.testing.assert_close(x[pair("roll", 7)], x.roll(1, 0))


@given(size=st.integers(2, 40), seed=seeds)
def test_derangement_has_no_fixed_point(size, seed):
    assert bool((pair("derangement", size, seed) != torch.arange(size)).all())


def test_derangement_of_one_row_is_itself():
    assert pair("derangement", 1).tolist() == [0]


@given(size=sizes, seed=seeds, classes=st.integers(1, 6))
def test_same_class(size, seed, classes):
    labels = labels_of(size, classes, seed)
    assert torch.equal(labels[pair("same_class", size, seed, labels)], labels)


@given(size=sizes, seed=seeds, classes=st.integers(1, 6))
def test_different_class(size, seed, classes):
    labels = labels_of(size, classes, seed)
    partner = pair("different_class", size, seed, labels)
    if len(labels.unique()) == 1:
        assert torch.equal(partner, torch.arange(size))
    else:
        assert bool((labels[partner] != labels).all())


def test_partners_are_uniform_over_those_allowed():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    generator = torch.Generator().manual_seed(0)
    allowed = {
        "random": lambda i, j: True,
        "derangement": lambda i, j: i != j,
        "same_class": lambda i, j: labels[i] == labels[j],
        "different_class": lambda i, j: labels[i] != labels[j],
    }
    for name, rule in allowed.items():
        drawn = torch.stack([pairing.PAIRINGS[name](6, generator, CPU, labels) for _ in range(3000)])
        for row in range(6):
            counts = drawn[:, row].bincount(minlength=6)
            expected = [j for j in range(6) if rule(row, j)]
            assert counts.sum() == counts[expected].sum(), name
            if len(expected) > 1:
                assert stats.chisquare(counts[expected].numpy()).pvalue > 1e-4, name


def test_soft_labels_count_by_their_largest_class():
    labels = torch.tensor([0, 1, 1, 0, 2, 1])
    soft = torch.nn.functional.one_hot(labels, 3) * 0.8 + 0.2 / 3
    assert soft.is_floating_point()
    for name in ("same_class", "different_class"):
        assert torch.equal(pair(name, 6, 3, labels), pair(name, 6, 3, soft))


def test_neighbors_in_the_batch():
    points = torch.randn(50, 2)
    index = torch.cdist(points, points).topk(11, largest=False).indices[:, 1:]
    pairs = pairing.Neighbors(index)
    ids = torch.randperm(50)[:20]
    partner = pair(pairs, 20, ids=ids)
    for row in range(20):
        present = [other for other in range(20) if ids[other] in index[ids[row]]]
        assert int(partner[row]) in (present or [row])
    assert len({tuple(pair(pairs, 20, seed, ids=ids).tolist()) for seed in range(4)}) == 4


def test_neighbors_of_the_rows_themselves():
    index = torch.tensor([[1], [2], [3], [0]])
    assert pair(pairing.Neighbors(index), 4).tolist() == [1, 2, 3, 0]
    x, target = mk.Mixup(pairing=pairing.Neighbors(index), lam_distribution=mk.sampling.Fixed(0.0))(
        torch.arange(4.0), torch.arange(4), ids=torch.tensor([3, 2, 1, 0])
    )
    # Sample 3 is row 0, its neighbour 0 is row 3; samples 2, 1 and 0 have theirs one row up.
    assert target.partner_labels.tolist() == [3, 0, 1, 2] and x.tolist() == [3.0, 0.0, 1.0, 2.0]


def test_without_neighbors_in_the_batch_a_sample_is_its_own_partner():
    index = torch.tensor([[5], [5], [5], [5], [5], [0]])
    assert pair(pairing.Neighbors(index), 3, ids=torch.tensor([1, 2, 3])).tolist() == [0, 1, 2]


def test_seed_decides():
    labels = labels_of(30, 4, 0)
    for name in ("random", "derangement", "same_class", "different_class"):
        assert torch.equal(pair(name, 30, 1, labels), pair(name, 30, 1, labels))
        assert not torch.equal(pair(name, 30, 1, labels), pair(name, 30, 2, labels))


def test_gradients_of_maps_that_are_not_one_to_one_are_deterministic(backend):
    labels = labels_of(64, 3, 0)
    x = torch.randn(64, 33, requires_grad=True)
    weight = torch.randn(64, 33)

    def gradient():
        fn = mk.Mixup(pairing="different_class", generator=torch.Generator().manual_seed(0))
        mixed, _ = fn(x, labels)
        return torch.autograd.grad((mixed * weight).sum(), x)[0]

    first = gradient()
    assert torch.equal(first, gradient())
    fn = mk.Mixup(pairing="different_class", generator=torch.Generator().manual_seed(0))
    draw = fn.draw(labels)
    lam = draw.lam.double()
    eager = (lam * x.double() + (1 - lam) * x.double()[draw.partner]) * weight
    torch.testing.assert_close(first.double(), torch.autograd.grad(eager.sum(), x)[0].double(), rtol=1e-5, atol=1e-5)


def test_a_function_of_the_callers_own():
    def next_row(size, generator, device, labels=None, ids=None):
        return torch.arange(size, device=device).roll(-1)

    _, target = mk.Mixup(pairing=next_row)(torch.randn(5, 2), torch.arange(5))
    assert target.partner_labels.tolist() == [1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pairing.as_pairing("nearest"), ValueError, "pairing must be one of 'random'"),
        (lambda: pair("same_class", 4), ValueError, "labels must be given"),
        (
            lambda: pair("same_class", 4, labels=torch.zeros(4, 3, dtype=torch.int64)),
            ValueError,
            r"labels must be \(B,\) classes or \(B, C\) soft to pair by class, got \(4, 3\)",
        ),
        (
            lambda: pair("different_class", 2, labels=torch.zeros(2, 3, 3, dtype=torch.int64)),
            ValueError,
            "labels must be .* to pair by class",
        ),
        (lambda: pairing.Neighbors(torch.zeros(3)), TypeError, "index must have dtype int64"),
        (lambda: pairing.Neighbors(torch.zeros(3, dtype=torch.int64)), ValueError, "index must have shape"),
        (lambda: pairing.Neighbors(torch.full((3, 2), 3)), ValueError, r"index must be in \[0, 2\]"),
        (lambda: pair(pairing.Neighbors(torch.zeros(3, 1, dtype=torch.int64)), 2), ValueError, "ids must be given"),
        (
            lambda: mk.Mixup()(torch.randn(3, 2), torch.arange(3), ids=torch.arange(2)),
            ValueError,
            "ids must have shape",
        ),
        (lambda: mk.Mixup()(torch.randn(3, 2), torch.arange(3), ids=torch.ones(3)), TypeError, "ids must have dtype"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
