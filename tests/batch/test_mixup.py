"""The batch the model sees: rows and target of every policy, the peers' semantics, estimates and seeds."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data._utils.pin_memory import pin_memory

import mixupe_kernels as mk

from .batches import CLASSES, by_hand, drawn, samples, seeded

POLICIES = {
    "full": {},
    "sample": {"clean_fraction": 1 / 8},
    "split": {"clean_fraction": 1 / 4, "split": True},
    "mixed": {"regularize": "mixed"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pairing", ["random", "flip", "roll", "derangement", "same_class", "different_class"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_rows_of_every_policy(policy, pairing, per_sample, backend):
    x, labels = samples()
    fn = mk.MixupE(0.7, pairing=pairing, per_sample=per_sample, generator=seeded(), **POLICIES[policy])
    draw = drawn(fn, labels, x)
    mixed, target = fn(x, labels)
    num_mixed, num_reg, total = {
        "full": (24, 24, 48),
        "sample": (24, 8, 32),
        "split": (18, 6, 24),
        "mixed": (24, 24, 24),
    }[policy]
    assert (target.num_mixed, target.num_reg, len(mixed)) == (num_mixed, num_reg, total)
    assert len(target.labels) == len(target.partner_labels) == len(target.lam) == total
    assert target.lam.dtype == torch.float32 and float(target.reg_weight) == pytest.approx(mk.expected_a_lambda(0.7))
    torch.testing.assert_close(mixed.double(), by_hand(draw, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target.lam, draw.target.lam)
    lam = target.lam[:num_mixed]
    assert (len(lam.unique()) > 1) == per_sample
    # Clean rows are the samples themselves, exactly, under their own label.
    clean = mixed[num_mixed:]
    assert torch.equal(target.labels[num_mixed:], target.partner_labels[num_mixed:])
    assert bool((target.lam[num_mixed:] == 1).all())
    where = (clean.unsqueeze(1) == x.unsqueeze(0)).all(2).float()
    assert bool((where.sum(1) == 1).all()) and bool((where.sum(0) <= 1).all())
    assert torch.equal(labels[where.argmax(1)] if len(clean) else labels[:0], target.labels[num_mixed:])
    if policy == "split":  # a row is mixed or clean, not both
        assert torch.equal(torch.cat([draw.rows[:num_mixed], draw.rows[num_mixed:]]).sort().values, torch.arange(24))


def test_num_clean_makes_all_rows_a_multiple_of_eight():
    for batch in range(1, 130):
        for fraction in (1 / 8, 1 / 4, 0.3, 0.9):
            fn = mk.MixupE(clean_fraction=fraction)
            count = fn.num_clean(batch)
            assert 1 <= count <= batch and fn.num_rows(batch) == batch + count
            if batch >= 8:
                assert (batch + count) % 8 == 0
                assert abs(count - fraction * batch) <= 8
            split = mk.MixupE(clean_fraction=fraction, split=True)
            assert split.num_rows(batch) == batch and split.num_clean(batch) <= max(batch - 1, 0)


def test_interval_regularizes_every_kth_batch_with_k_times_the_weight():
    x, labels = samples()
    fn = mk.MixupE(interval=3)
    targets = [fn(x, labels)[1] for _ in range(6)]
    assert [target.num_reg for target in targets] == [0, 0, 24, 0, 0, 24]
    assert float(targets[2].reg_weight) == pytest.approx(3 * mk.expected_a_lambda(1.0))


def test_same_as_timms_mixup_in_batch_mode():
    # timm/data/mixup.py, Mixup._mix_batch with cutmix off: x.flip(0), one λ, targets by one-hot with smoothing.
    x, labels = samples(8, 3, 4, 4)
    smoothing = 0.1
    fn = mk.Mixup(0.8, pairing="flip", generator=seeded())
    mixed, target = fn(x, labels)
    lam = target.lam[0].item()
    expected = x * lam + x.flip(0) * (1 - lam)
    off, on = smoothing / CLASSES, 1 - smoothing + smoothing / CLASSES

    def one_hot(values):
        return torch.full((8, CLASSES), off).scatter_(1, values.view(-1, 1), on)

    torch.testing.assert_close(mixed, expected)
    expected_target = one_hot(labels) * lam + one_hot(labels.flip(0)) * (1 - lam)
    torch.testing.assert_close(target.dense(CLASSES, label_smoothing=smoothing), expected_target)


def test_same_as_torchvisions_mixup():
    # torchvision/transforms/v2/_augment.py, MixUp: inpt.roll(1, 0).mul_(1 - lam).add_(inpt.mul(lam)), labels alike.
    x, labels = samples(8, 3, 4, 4)
    mixed, target = mk.Mixup(0.8, pairing="roll", generator=seeded())(x, labels)
    lam = target.lam[0].item()
    torch.testing.assert_close(mixed, x.roll(1, 0).mul(1 - lam).add(x.mul(lam)))
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).float()
    torch.testing.assert_close(target.dense(CLASSES), one_hot.roll(1, 0).mul(1 - lam).add(one_hot.mul(lam)))


def test_soft_labels():
    x, labels = samples()
    soft = torch.nn.functional.one_hot(labels, CLASSES).float() * 0.9 + 0.02
    hard_target, soft_target = (mk.MixupE(generator=seeded())(x, y)[1] for y in (labels, soft))
    torch.testing.assert_close(soft_target.dense(CLASSES), hard_target.dense(CLASSES) * 0.9 + 0.02)


@pytest.mark.parametrize("policy", ["sample", "split"])
def test_policies_estimate_the_same_regularizer_without_bias(policy):
    """E over draws of the mean of any per-row value on the clean rows is its mean over the batch; with split, the mixed
    rows estimate mixup's loss likewise."""
    x, labels = samples(16, 1)
    fn = mk.MixupE(lam_distribution=mk.sampling.Fixed(0.7), pairing="roll", generator=seeded(), **POLICIES[policy])
    full, full_target = mk.MixupE(lam_distribution=mk.sampling.Fixed(0.7), pairing="roll")(x, labels)
    draws = 4000
    means = torch.empty(draws, 2)
    for draw in means:
        rows, target = fn(x, labels)
        draw[0], draw[1] = rows[target.num_mixed :].exp().mean(), rows[: target.num_mixed].exp().mean()
    expected = torch.stack([full[16:].exp().mean(), full[:16].exp().mean()])
    error = means.std(0) / draws**0.5
    assert bool(((means.mean(0) - expected).abs() < 4 * error + 1e-5).all())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_the_same_batches(policy):
    x, labels = samples()

    def batches(seed):
        fn = mk.MixupE(0.4, prob=0.9, per_sample=True, generator=seeded(seed), **POLICIES[policy])
        return [fn(x, labels) for _ in range(3)]

    for (first, first_target), (second, second_target) in zip(batches(1), batches(1), strict=True):
        assert torch.equal(first, second) and torch.equal(first_target.lam, second_target.lam)
    assert not torch.equal(batches(1)[0][0], batches(2)[0][0])


def test_torch_manual_seed_decides_without_a_generator():
    x, labels = samples()
    torch.manual_seed(3)
    first, _ = mk.MixupE()(x, labels)
    torch.manual_seed(3)
    assert torch.equal(first, mk.MixupE()(x, labels)[0])


def test_prob():
    x, labels = samples()
    assert all(torch.equal(mk.Mixup(prob=0.0)(x, labels)[0], x) for _ in range(3))
    _, target = mk.Mixup(prob=0.25, per_sample=True, generator=seeded())(torch.randn(4000, 1), torch.zeros(4000).long())
    assert abs((target.lam < 1).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    fn = mk.Mixup(prob=0.25, generator=seeded())
    mixed = torch.tensor([fn(x, labels)[1].lam[0].item() < 1 for _ in range(1000)])
    assert abs(mixed.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 1000) ** 0.5


def test_not_enabled_gives_plain_samples():
    x, labels = samples()
    fn = mk.MixupE()
    fn.enabled = False
    same, target = fn(x, labels)
    assert same is x and target.labels is labels and (target.num_mixed, target.num_reg) == (24, 0)
    loss = mk.mixupe_loss(torch.eye(CLASSES)[labels] * 3, target, eta=1.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(torch.eye(CLASSES)[labels] * 3, labels))


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pairing", ["random", "flip", "roll", "derangement", "same_class", "different_class"])
def test_tiny_batches(batch, policy, pairing):
    x, labels = torch.randn(batch, 3), torch.zeros(batch, dtype=torch.int64)
    mixed, target = mk.MixupE(pairing=pairing, **POLICIES[policy])(x, labels)
    assert len(mixed) == len(target.lam) and target.num_mixed <= len(mixed)
    if batch == 1:  # its only partner is itself
        torch.testing.assert_close(mixed, x.expand(len(mixed), 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_reach_the_samples(policy, backend):
    x, labels = samples(dtype=torch.float64)
    x.requires_grad_()
    fn = mk.MixupE(pairing="different_class", per_sample=True, generator=seeded(), **POLICIES[policy])
    draw = drawn(fn, labels, x)
    mixed, _ = fn(x, labels)
    weight = torch.randn_like(mixed)
    ours, by_definition = (torch.autograd.grad((rows * weight).sum(), x)[0] for rows in (mixed, by_hand(draw, x)))
    torch.testing.assert_close(ours, by_definition)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 33),
    shape=st.lists(st.integers(1, 4), max_size=4),
    fraction=st.floats(0.05, 1),
    split=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, shape, fraction, split, seed):
    x, labels = torch.randn(batch, *shape), torch.randint(CLASSES, (batch,))
    fn = mk.MixupE(clean_fraction=fraction, split=split and fraction < 1, generator=seeded(seed))
    draw = drawn(fn, labels, x)
    mixed, target = fn(x, labels)
    assert mixed.shape == (len(target.lam), *shape) and len(mixed) <= fn.num_rows(batch)
    torch.testing.assert_close(mixed.double(), by_hand(draw, x), rtol=1e-5, atol=1e-6)


def test_target_is_a_pytree_and_moves_and_pickles():
    _, target = mk.MixupE()(*samples())
    leaves, tree = tree_flatten(target)
    again = tree_unflatten(leaves, tree)
    assert type(again) is mk.MixedTarget and again.lam is target.lam
    moved = target.to("meta", torch.float64)
    assert moved.labels.device.type == "meta" and moved.labels.dtype == torch.int64 and moved.lam.dtype == torch.float64
    assert moved.num_mixed == target.num_mixed and target.to("cpu").lam is target.lam
    loaded = pickle.loads(pickle.dumps(target))
    assert type(loaded) is mk.MixedTarget and torch.equal(loaded.lam, target.lam)
    pinned_type = type(pin_memory(target, None)) if torch.cuda.is_available() else mk.MixedTarget
    assert pinned_type is mk.MixedTarget


def test_deep_copies_draw_on_their_own():
    x, labels = samples()
    fn = mk.MixupE(0.3, generator=seeded())
    fn(x, labels)
    twin = copy.deepcopy(fn)
    assert torch.equal(fn(x, labels)[0], twin(x, labels)[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clean_fraction": 1 / 8},
        {"clean_fraction": 1 / 4, "split": True},
        {"regularize": "mixed", "pairing": "flip"},
        {"alpha": 0.3, "per_sample": True, "prob": 0.5},
        {"pairing": "different_class", "alpha": 0.01},
        {"num_samples": 3, "num_classes": CLASSES},
    ],
)
def test_compiles_without_a_graph_break(options):
    x, labels = samples(16)
    fn, criterion = mk.MixupE(**options), mk.MixupELoss(eta=0.1)
    weight = torch.randn(6, CLASSES, requires_grad=True)

    def step(x, labels):
        rows, target = fn(x, labels)
        return criterion(rows @ weight, target), rows, target

    torch._dynamo.reset()
    loss, rows, target = torch.compile(step, fullgraph=True, backend="aot_eager")(x, labels)
    expected = mk.mixupe_loss(rows.detach() @ weight, target, eta=0.1)
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, weight)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("mixer", [mk.Mixup, mk.MixupE])
def test_works_in_inference_mode_and_after_it(mixer):
    x, labels = samples(16)
    fn = mixer()
    with torch.inference_mode():
        fn(x, labels)
    x.requires_grad_()
    rows, target = fn(x, labels)
    mk.MixupELoss()(rows.flatten(1)[:, :CLASSES], target).backward()
    assert x.grad.isfinite().all()


def test_mixing_more_than_two(backend):
    x, labels = samples(24, 3, 4)
    fn = mk.MixupE(0.5, num_samples=4, num_classes=CLASSES, per_sample=True, clean_fraction=1 / 3, generator=seeded())
    draw = drawn(fn, labels, x)
    mixed, target = fn(x, labels)
    weights, index = draw.lam[: 24 * 4].reshape(24, 4).double(), draw.partner[: 24 * 4].reshape(24, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(24, dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(index[:, 0], torch.arange(24))
    expected = (weights[:, :, None, None] * x.double()[index]).sum(1)
    torch.testing.assert_close(mixed[:24].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mixed[24:], x[draw.partner[96:]]) and target.num_reg == 8 and len(mixed) == 32
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
    expected_labels = torch.cat([(weights[:, :, None] * one_hot[index]).sum(1), one_hot[draw.partner[96:]]])
    torch.testing.assert_close(target.dense(CLASSES).double(), expected_labels, rtol=1e-5, atol=1e-6)
    assert float(target.reg_weight) == pytest.approx(3 * 0.5 / (4 * 0.5 + 1))
    soft, _ = mk.Mixup(num_samples=3)(x, one_hot.float())
    assert soft.shape == x.shape


def test_mixing_more_than_two_with_prob_keeps_the_own_sample():
    x, labels = samples()
    fn = mk.Mixup(num_samples=3, num_classes=CLASSES, prob=0.0, per_sample=True)
    mixed, target = fn(x, labels)
    assert torch.equal(mixed, x)
    assert torch.equal(target.dense(CLASSES), torch.nn.functional.one_hot(labels, CLASSES).float())
