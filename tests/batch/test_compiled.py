"""Mixers inside a compiled step: one graph, or two, for a whole training run."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mixupe_kernels as mk

GLOBAL = {}  # what a training script's globals hold
CLASSES = 5


def run(fn, batches, epochs=1):
    """(graphs made, rows and target of each batch) of a run in which each epoch has ``batches``' sizes."""
    GLOBAL["fn"] = fn

    def step(x, labels):
        rows, target = GLOBAL["fn"](x, labels)
        return rows * 1, target

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, results = torch.compile(step, fullgraph=True, backend=counter), []
    for epoch in range(epochs):
        fn.set_epoch(epoch)
        for size in batches:
            x, labels = torch.randn(size, 6), torch.randint(CLASSES, (size,))
            results.append((x, labels, *compiled(x, labels)))
    return counter.frame_count, results


def assert_mixed(x, labels, rows, target):
    """The rows are those that the target says, of samples that differ."""
    assert rows.shape == (len(target.lam), 6)
    clean = rows[target.num_mixed :]
    assert torch.equal(target.labels[target.num_mixed :], target.partner_labels[target.num_mixed :])
    assert bool((clean.unsqueeze(1) == x.unsqueeze(0)).all(2).any(1).all())


OPTIONS = [
    {},
    {"per_sample": True},
    {"pairing": "different_class"},
    {"pairing": "same_class", "per_sample": True},
    {"pairing": "derangement"},
    {"pairing": "flip"},
    {"alpha": 0.3, "per_sample": True, "prob": 0.5},
    {"alpha": 0.001},
    {"clean_fraction": 1 / 4},
    {"clean_fraction": 1 / 4, "split": True, "alpha": 0.2},
    {"regularize": "mixed", "alpha": 0.2},
    {"lam_distribution": mk.sampling.WShaped(), "per_sample": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "default")
def test_a_second_batch_size_makes_a_second_graph_and_a_third_none(options):
    graphs, results = run(mk.MixupE(**options), [16, 16, 24, 24, 16, 40])
    assert graphs <= 2
    for result in results:
        assert_mixed(*result)


def test_counting_steps_makes_no_graphs():
    fn = mk.MixupE()
    graphs, _ = run(fn, [8] * 12)
    assert graphs == 1 and fn.steps == 12


@pytest.mark.parametrize("interval", [3, 16])
def test_an_interval_makes_two_graphs(interval):
    fn = mk.MixupE(interval=interval)
    graphs, results = run(fn, [8] * (2 * interval + 1))
    assert graphs == 2
    assert [target.num_reg > 0 for *_, target in results] == [
        (number + 1) % interval == 0 for number in range(2 * interval + 1)
    ]
    assert fn.steps == 2 * interval + 1


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"alpha": mk.LinearRamp(0.2, 2.0, last_epoch=5)}, 1),
        ({"alpha": mk.LinearRamp(0.2, 2.0, last_epoch=5), "beta": 0.7, "per_sample": True}, 1),
        ({"alpha": mk.LinearRamp(0.0, 1.0, last_epoch=5)}, 2),
        ({"eta_ramp": mk.LinearRamp(0, 1, last_epoch=5)}, 1),
        ({"eta_ramp": mk.LinearRamp(0, 1, last_epoch=5), "warmup_epochs": 2, "off_epoch": 5}, 2),
    ],
)
def test_schedules_make_no_graphs(options, allowed):
    fn = mk.MixupE(**options)
    graphs, results = run(fn, [8, 8], epochs=7)
    assert graphs <= allowed
    for epoch in range(7):
        fn.set_epoch(epoch)
        _, eager = fn(*results[0][:2])
        target = results[2 * epoch][3]
        assert target.num_reg == eager.num_reg
        assert float(target.reg_weight) == pytest.approx(float(eager.reg_weight))


def test_a_compiled_ramp_draws_by_its_law():
    fn = mk.MixupE(mk.LinearRamp(0.5, 4.0, last_epoch=1), per_sample=True)
    torch.manual_seed(0)
    _, results = run(fn, [4000], epochs=2)
    for alpha, (*_, target) in zip((0.5, 4.0), results, strict=True):
        lam = target.lam[:4000]
        assert lam.mean().item() == pytest.approx(0.5, abs=0.03)
        assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.3, "per_sample": True, "prob": 0.5},
        {"clean_fraction": 1 / 4, "pairing": "different_class"},
        {"alpha": 0.001, "clean_fraction": 1 / 4, "split": True},
        {"num_samples": 3, "num_classes": CLASSES},
    ],
)
def test_a_generator_decides_in_a_graph_as_outside_it(options):
    def fn():
        return mk.MixupE(**options, generator=torch.Generator().manual_seed(3))

    eager = fn()
    torch.manual_seed(0)
    default = torch.get_rng_state()
    graphs, results = run(fn(), [16] * 3)
    assert graphs == 1
    for x, labels, rows, target in results:
        expected, expected_target = eager(x, labels)
        torch.testing.assert_close(target.lam, expected_target.lam)
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(target.dense(CLASSES), expected_target.dense(CLASSES))
    assert not torch.equal(torch.get_rng_state(), default)  # the test's own samples; the mixer drew from its generator
    graphs, results = run(fn(), [16, 24, 40])
    assert graphs == 2


def test_cutmix_in_a_graph():
    x, labels = torch.randn(8, 3, 9, 7), torch.arange(8)
    fn = mk.MixupE(cutmix_alpha=1.0, generator=torch.Generator().manual_seed(0))
    eager = mk.MixupE(cutmix_alpha=1.0, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        rows, target = compiled(x, labels)
        expected, expected_target = eager(x, labels)
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(target.lam, expected_target.lam)


RAMP = mk.LinearRamp(0, 1, last_epoch=3)
RUNS = [
    ({}, 2),
    ({"clean_fraction": 1 / 4, "pairing": "different_class"}, 2),
    ({"num_samples": 3, "num_classes": CLASSES}, 2),
    ({"alpha": mk.LinearRamp(0.2, 2.0, last_epoch=3), "eta_ramp": RAMP}, 2),
    ({"interval": 3}, 3),  # batches with clean rows, batches without, and one of them for the first size alone
    ({"warmup_epochs": 1, "eta_ramp": RAMP}, 3),
]


@pytest.mark.parametrize(("options", "allowed"), RUNS, ids=["-".join(options) for options, _ in RUNS])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_whole_run_takes_few_graphs(options, allowed, dynamic):
    """Mixer, model and criterion in one graph, for batches of several sizes."""
    fn, criterion, used = mk.MixupE(**options), mk.MixupELoss(), set()
    make = torch._dynamo.lookup_backend("aot_eager")

    def backend(module, inputs):
        made = make(module, inputs)

        def run(*args):
            used.add(made)  # torch makes some graphs twice and drops the first
            return made(*args)

        return run

    def step(x, labels):
        rows, target = fn(x, labels)
        return criterion(rows, target)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for epoch in range(3):
        fn.set_epoch(epoch)
        for size in (16, 16, 24, 40, 17):
            compiled(torch.randn(size, CLASSES), torch.randint(CLASSES, (size,)))
    assert len(used) <= (2 if dynamic else allowed)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("which", ["eta", "reg_weight", "criterion"])
def test_a_number_that_changes_makes_no_graphs(which, dynamic):
    given, criterion = {"eta": 0.5, "reg_weight": 0.25}, mk.MixupELoss(0.5)
    labels, lam = torch.randint(CLASSES, (8,)), torch.rand(8)

    def loss(logits):
        target = mk.MixedTarget(labels, labels.flip(0), lam, 4, 4, given["reg_weight"])
        if which == "criterion":
            return criterion(logits, target)
        return mk.mixupe_loss(logits, target, eta=given["eta"])

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=dynamic)
    logits, results = torch.randn(8, CLASSES), []
    for number in range(6):
        given[which] = criterion.eta = 0.3 * number
        results.append((compiled(logits), dict(given), criterion.eta))
    assert counter.frame_count <= 2
    for result, numbers, criterion.eta in results:
        given.update(numbers)
        torch.testing.assert_close(result, loss(logits))
