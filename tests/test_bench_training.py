"""The training benchmarks measure what they say: fair contenders, data without leaks, batched runs equal to single ones."""

import math
import random
import re

import numpy as np
import pytest
import torch

import mixupe_kernels as mk
from bench import methods, models, results, step, step_methods
from experiments import data, ensemble
from experiments.quality import demo
from experiments.quality import tabular as quality

MODELS = {"mlp": 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10, "lenet": 16_321_570, "preact_resnet18": 11_218_340,
          "resnet50": 25_557_032, "vit_b16": 86_567_656}  # fmt: skip
BUILD = {
    "mlp": lambda: models.mlp(64, 10),
    "lenet": models.lenet,
    "preact_resnet18": models.preact_resnet18,
    "resnet50": models.resnet50,
    "vit_b16": models.vit_b16,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_papers_size(name):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in BUILD[name]().parameters()) == MODELS[name]


@pytest.mark.parametrize("spec", [spec for spec in step.SPECS if not spec.needs_gpu], ids=lambda spec: spec.name)
def test_models_map_their_shape_to_logits(spec):
    assert spec.model()(torch.randn(2, *spec.shape)).shape == (2, spec.classes)


@pytest.mark.parametrize("build", [models.preact_resnet50, models.resnet50])
def test_residual_networks_run(build):
    assert build(7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_vit_runs():
    model = models.VisionTransformer(image=32, patch=8, width=24, depth=2, heads=3, classes=5)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def mlp_and_batch(rows=20):
    return models.mlp(6, 4), torch.randn(rows, 6), torch.randint(4, (rows,))


def test_eager_contenders_compute_what_ours_compute():
    # The same λ and partners go through the eager code and through ours.
    model, x, labels = mlp_and_batch()
    random.seed(3)
    mixed, dense = step_methods.eager_mixup(model, 4).prepare(x.clone(), labels)
    random.seed(3)
    lam = random.betavariate(step_methods.ALPHA, step_methods.ALPHA)
    partner = torch.arange(19, -1, -1)
    torch.testing.assert_close(mixed, mk.mix(x, partner, lam))
    rows = torch.full((20,), lam)
    target = mk.MixedTarget(labels, labels[partner], rows, 20, 0, 0.0)
    torch.testing.assert_close(
        step_methods.soft_target_cross_entropy(model(mixed), dense), mk.mixupe_loss(model(mixed), target, eta=0.0)
    )


def test_authors_form_is_our_full_policy():
    model, x, labels = mlp_and_batch()
    torch.manual_seed(1)
    random.seed(1)
    method = step_methods.authors(model, 4)
    mixed, clean, _, partner, lam = inputs = method.prepare(x, labels)
    target = mk.MixedTarget(
        torch.cat([labels, labels]),
        torch.cat([labels[partner], labels]),
        torch.cat([torch.full((20,), lam), torch.ones(20)]),
        20,
        20,
        mk.expected_a_lambda(step_methods.ALPHA),
    )
    mine = mk.MixupELoss(step_methods.ETA)(model(torch.cat([mixed, clean])), target)
    theirs = method.objective(*inputs)
    torch.testing.assert_close(mine, theirs)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients)


def test_step_methods_have_the_rows_they_are_charged_for():
    spec = step.SPECS[0]
    model = spec.model()
    seen = []
    counted = torch.nn.Sequential(model)
    counted.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    x, labels = torch.randn(100, 64), torch.randint(10, (100,))
    for name, method in step_methods.make_methods(counted, spec.classes, 100, torch.zeros(64)).items():
        if method.extra_rows is None:
            continue
        seen.clear()
        for _ in range(method.steps):
            method.objective(*method.prepare(x.clone(), labels)).backward()
        assert sum(seen) == pytest.approx(100 * method.steps * (1 + method.extra_rows)), name


def test_peak_bytes_counts_what_a_call_holds():
    parameter = torch.nn.Linear(1, 1)

    def call():
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        return second * 2

    assert 8_000_000 <= step.peak_bytes(parameter, call, "cpu") < 8_001_000  # the scalars take some bytes too


def test_step_rows_and_bars():
    torch.set_num_threads(1)
    rows = step.Bench(step.SPECS[0], 24, "cpu", "eager").run(
        2, True, lambda name, error: pytest.fail(f"{name}: {error}")
    )
    by_name = {row.method: row for row in rows}
    assert by_name["Mixup eager"].ratio == 1 and by_name["Mixup"].ratio_ours == 1
    sample = by_name["MixupE sample 1/8"]
    assert sample.prediction == pytest.approx(1 + 8 / 24 * sample.share)
    assert sample.target_met == (max(sample.ratio, sample.ratio_ours) <= 1.3)
    assert sample.own_seconds < sample.seconds and len(step.bars(rows)) == 6


class _Slow(torch.nn.Module):
    """A model whose forward and backward take a second each of a clock that nothing else moves."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.linear = clock, torch.nn.Linear(64, 10)

    def forward(self, x):
        self.clock[0] += 1
        z = self.linear(x)
        z.register_hook(self.backward)
        return z * 1

    def backward(self, gradient):
        self.clock[0] += 1


@pytest.mark.parametrize("name", ["Mixup eager", "Mixup", "MixupE, authors' form", "MixupE interval 4"])
def test_own_part_leaves_out_the_model(monkeypatch, name):
    clock = [0.0]
    monkeypatch.setattr(step.time, "perf_counter", lambda: clock[0])
    spec = step.SPECS[0]._replace(model=lambda: _Slow(clock))
    bench = step.Bench(spec, 24, "cpu", "eager")
    method = step_methods.make_methods(bench.model, 10, 24, torch.zeros(64))[name]

    def prepare(*args):
        clock[0] += 0.25
        return method.prepare(*args)

    def objective(*args):
        loss = method.objective(*args)
        clock[0] += 0.125
        return loss

    call = bench.contender(name, step_methods.Method(prepare, objective, 0.0, method.steps), bench.x, bench.labels)
    bench.own_parts.seconds.clear()
    call()
    call()
    assert bench.own_parts.seconds[name] == [0.375 * method.steps] * 2


def test_own_part_is_known_in_eager_mode_only():
    bench = step.Bench(step.SPECS[0], 24, "cpu", "compile")
    with bench.own_parts.of("Mixup"):
        bench.own_parts.mark()
        bench.model(bench.x).sum().backward()
    assert bench.own_parts.seconds["Mixup"] == [0]


@pytest.mark.parametrize(
    "measured, error, verdict",
    [
        (1.0, None, "met"),
        (1.01, None, "not met"),
        (1.01, math.nan, "not met"),
        (1.01, 0.005, "not met"),
        (1.01, 0.006, "not met, within error"),
        (0.99, 0.005, "met"),
        (0.99, 0.006, "met, within error"),
    ],
)
def test_a_bar_says_whether_two_standard_errors_would_turn_it(measured, error, verdict):
    bar = step.StepBar("MLP", "Mixup / Mixup eager", measured, error, 1.0)
    assert re.sub(r"\[.*?\]", "", bar.verdict) == verdict


ARFF = """% comment
@relation things
@attribute 'size' real
@attribute colour { red, green, 'blue' }
@attribute class {no, yes}
@data
1.0,red,yes
?,green,no
3.0,?,yes
5.0,blue,no
"""


def test_arff_and_csv_read_the_same(tmp_path):
    arff, table = tmp_path / "a.b.arff", tmp_path / "c.csv"
    arff.write_text(ARFF)
    table.write_text("size,colour,class\n" + ARFF.split("@data\n")[1])
    first, second = data.folder(tmp_path)
    assert (first.name, second.name) == ("a-b", "c")
    assert first.levels == second.levels == (3,) and first.num_classes == second.num_classes == 2
    np.testing.assert_array_equal(first.numeric, [[1], [np.nan], [3], [5]])
    np.testing.assert_array_equal(first.numeric, second.numeric)
    np.testing.assert_array_equal(first.labels, [1, 0, 1, 0])
    np.testing.assert_array_equal(first.categorical, [[0], [1], [-1], [2]])
    np.testing.assert_array_equal(second.categorical, [[2], [1], [-1], [0]])  # levels in alphabetical order


def test_features_are_fitted_on_the_training_rows_only():
    table = data.Table(
        "t",
        np.array([[1.0], [3.0], [np.nan], [100.0]]),
        np.array([[0], [0], [-1], [1]]),
        (2,),
        np.array([0, 1, 0, 1]),
        2,
    )
    x = data.features(table, np.array([0, 1]))
    torch.testing.assert_close(
        x[:, 0], torch.tensor([-1.0, 1.0, 0.0, 98.0])
    )  # mean 2, deviation 1, missing is the mean
    torch.testing.assert_close(
        x[:, 1:], torch.tensor([[0.0, 0.0], [0, 0], [0, 0], [-1, 1]])
    )  # mode is 0; constant in fit


def test_split_is_a_partition_and_stratified():
    table = data.bundled("iris")
    parts = data.split(table, seed=3)
    assert [len(labels) for labels in (parts.train, parts.validation, parts.test)] == [90, 30, 30]
    assert parts.test.bincount().tolist() == [10, 10, 10]
    assert len(parts.x_train) == 90 and parts.x_train.mean(0).abs().max() < 1e-5
    again = data.split(table, seed=3)
    assert torch.equal(parts.x_test, again.x_test) and not torch.equal(parts.x_test, data.split(table, seed=4).x_test)


def test_corruption_changes_the_share_it_says():
    labels = torch.zeros(1000, dtype=torch.int64)
    noisy = data.corrupt(labels, 0.5, 10, seed=0)
    assert 400 < (noisy != labels).sum() <= 500  # a tenth of the noise hits the label itself
    assert torch.equal(noisy, data.corrupt(labels, 0.5, 10, seed=0))
    assert torch.equal(data.corrupt(labels, 0.0, 10, seed=0), labels)


def single_run(policy, member, parts, classes, epochs):
    """The drop-in pair in a plain loop, in float64: what ``ensemble.train`` must reproduce for each member."""
    torch.manual_seed(member.seed)
    model = models.mlp(parts.x_train.shape[1], classes).double()
    optimizer = torch.optim.Adam(model.parameters(), ensemble.LEARNING_RATE)
    generator = torch.Generator().manual_seed(member.seed)
    if policy == methods.ERM_AND_REGULARIZER:
        batch, criterion = methods.regularized_erm(member.alpha), mk.MixupELoss(member.eta)

        def train_step(x, labels):
            x, target = batch(x, labels)
            optimizer.zero_grad()
            criterion(model(x), target).backward()
            optimizer.step()
    else:
        train_step = methods.make_step(methods.POLICIES[policy], model, optimizer, member.alpha, member.eta, generator)
    order = torch.Generator().manual_seed(member.seed)
    x = parts.x_train.double()
    for _ in range(epochs):
        for rows in data.batches(len(parts.train), ensemble.BATCH, order):
            train_step(x[rows], parts.train[rows])
    return model


@pytest.mark.parametrize("policy", [*methods.TABULAR, methods.ERM_AND_REGULARIZER])
def test_ensemble_is_the_single_runs(policy):
    table = data.bundled("wine")
    members = [ensemble.Member(0, 0.2, 0.5), ensemble.Member(0, 1.0, 0.1), ensemble.Member(1, 0.5, 1.0)]
    splits = {seed: data.split(table, seed) for seed in (0, 1)}
    *_, network = ensemble.train(policy, members, splits, table.num_classes, 3, torch.float64)
    for index, member in enumerate(members):
        model = single_run(policy, member, splits[member.seed], table.num_classes, 3)
        weights = [layer.weight for layer in model if isinstance(layer, torch.nn.Linear)]
        for batched, single in zip(network.weights, weights, strict=True):
            torch.testing.assert_close(batched[index].t(), single, rtol=1e-9, atol=1e-11)


def test_fgsm_moves_each_feature_up_the_loss():
    network = ensemble.Network([ensemble.Member(0, 1.0, 0.0)], 4, 3)
    x, labels = torch.randn(1, 50, 4), torch.randint(3, (1, 50))
    still = ensemble.fgsm_errors(network, x, labels, torch.zeros(1, 1, 4))
    assert torch.equal(still, ensemble.errors(network, x, labels))
    assert ensemble.fgsm_errors(network, x, labels, torch.full((1, 1, 4), 3.0)) > still


def run(policy, seed, validation, test, budget=quality.EPOCHS, eta=0.1):
    return quality.Run("iris", 0.0, policy, budget, seed, 1.0, eta, 1.0, 25, validation, test, 0.0, 0.0)


def test_choice_looks_at_validation_only():
    runs = [run("full", 0, 3.0, 1.0), run("full", 0, 2.0, 9.0, eta=0.01), run("full", 0, 2.0, 0.0, eta=1.0)]
    assert quality.choose(runs)[0].test_error == 9.0


def test_summary_is_paired_by_seed():
    runs = [run("full", seed, 1.0, error) for seed, error in enumerate((4.0, 6.0, 8.0))]
    runs += [run("sample", seed, 1.0, error) for seed, error in ((2, 8.0), (0, 5.0), (1, 8.0))]
    full, sample = quality.summarise(runs)
    assert (full.error, full.error_std, full.difference, full.p_value) == (6.0, 2.0, 0.0, 1.0)
    assert full.paper == 7.29 and sample.paper is None
    assert sample.difference == pytest.approx(1.0)
    assert sample.difference_error == pytest.approx(1 / 3**0.5)
    assert sample.p_value == pytest.approx(0.2254, abs=1e-4)  # t = √3 with two degrees of freedom


def test_quality_runs_and_resumes(tmp_path, monkeypatch):
    costs = [quality.Cost("iris", policy, 1.25 if policy == "full" else 1.0, 1.0, 1.5) for policy in methods.TABULAR]
    monkeypatch.setattr(quality, "measure_costs", lambda table: costs)
    arguments = ["--bundled", "iris", "--seeds", "2", "--epochs", "4", "--out", str(tmp_path)]
    assert quality.main(arguments) == 0
    first = results.read_csv(tmp_path / "runs.csv", quality.Run)
    assert {(r.policy, r.budget, r.epochs) for r in first if r.policy in ("full", "split")} == {
        ("full", "epochs", 4), ("full", "time", 4), ("split", "epochs", 4), ("split", "time", 5)
    }  # fmt: skip
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    results.write_csv(tmp_path / "runs.csv", [r for r in first if r.policy != "split"], quality.Run)
    assert quality.main(arguments) == 0
    again = results.read_csv(tmp_path / "runs.csv", quality.Run)
    assert sorted(map(repr, again)) == sorted(map(repr, first))


def test_demo_writes_table_and_picture(tmp_path, capsys):
    assert demo.main(["--seeds", "2", "--epochs", "2", "--rounds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = results.read_csv(tmp_path / "summary.csv", demo.Summary)
    expected = [(task.name, policy) for task in demo.tasks() for policy in task.policies]
    assert [(row.data_set, row.policy) for row in rows] == expected and len({name for name, _ in expected}) == 3
    assert all(0 < row.ece < 100 for row in rows)
    assert "MixupE sample 1/8" in printed and str(tmp_path / "demo.png") in printed
    (line,) = [" ".join(line.split()) for line in printed.splitlines() if methods.POLICIES["recipe"].label in line]
    for row in rows:
        if row.policy == "recipe":  # its error and its calibration stand side by side
            assert f" {row.error:.2f} ± {row.error_std:.2f} {row.ece:.1f} " in line
    assert len(results.read_csv(tmp_path / "curves.csv", demo.Point)) == 2 * 2 * len(expected)
    assert (tmp_path / "demo.png").stat().st_size > 10_000
