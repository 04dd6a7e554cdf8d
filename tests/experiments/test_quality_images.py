"""``python -m experiments quality images``: parts without leaks, rows that resume, differences paired by seed, choices by validation."""

import gzip
import math

import numpy as np
import pytest
import torch

import mixupe_kernels as mk
from bench import models, results
from experiments import calibration, frame, image_data
from experiments.quality import images
from experiments.quality import plan as images_plan
from experiments.quality import summary as images_summary
from experiments.quality import tabular as quality
from experiments.quality.plan import AUTHORS, ERM, MIXUP, RECIPE, UPDATE_BN, Cell, Cost, Method, Run

COMMITTED = frame.RESULTS / "quality-images"


@pytest.mark.parametrize("build, size", [(models.small_cnn, 14_714), (models.narrow_preact_resnet, 77_562)])
def test_networks_take_images_and_signals(build, size):
    model = build(10)
    assert model(torch.randn(3, 1, 14, 14)).shape == (3, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    signals = build(10, flat=True)
    assert signals(torch.randn(3, 1, 1, 40)).shape == (3, 10)
    assert all(layer.kernel_size[0] == 1 for layer in signals.modules() if isinstance(layer, torch.nn.Conv2d))


def test_digits_are_a_stratified_partition_scaled_by_the_training_rows():
    kind = image_data.SETS["digits"]
    parts = kind.split(3)
    assert tuple(map(len, (parts.train, parts.validation, parts.test))) == kind.rows
    counts = parts.train.bincount(minlength=10)
    assert counts.max() - counts.min() <= 3
    rows = torch.cat([parts.x_train, parts.x_validation, parts.x_test]).flatten(1)
    assert len(rows) == 1797 and len(rows.unique(dim=0)) == 1797
    assert parts.x_train.mean().abs() < 1e-6 and parts.x_train.std() == pytest.approx(1, abs=1e-6)
    assert torch.equal(parts.x_test, kind.split(3).x_test) and not torch.equal(parts.x_test, kind.split(4).x_test)


def test_seeds_of_mnist_1d_share_test_rows_and_nothing_else():
    first, second = (image_data.mnist_1d(seed, (50, 30, 40)) for seed in (0, 1))
    assert [tuple(x.shape) for x, _ in first] == [(50, 1, 1, 40), (30, 1, 1, 40), (40, 1, 1, 40)]
    assert torch.equal(first[2][0], second[2][0]) and not torch.equal(first[0][0], second[0][0])
    rows = torch.cat([x for x, _ in (*first, *second[:2])]).flatten(1)
    assert len(rows.unique(dim=0)) == 200


def test_mnist_is_read_as_means_of_four_pixels(tmp_path):
    pixels = np.arange(2 * 784).reshape(2, 784) % 256
    path = tmp_path / "mnist.csv.gz"
    with gzip.open(path, "wt") as file:
        np.savetxt(file, np.column_stack([pixels, [7, 3]]), delimiter=",", fmt="%d")
    x, labels = image_data.read_mnist(path)
    assert x.shape == (2, 1, 14, 14) and labels.tolist() == [7, 3]
    corner = pixels[0].reshape(28, 28)[:2, :2].mean() / 255
    assert x[0, 0, 0, 0].item() == pytest.approx(corner) and x.min() >= 0 and x.max() <= 1


def test_temperature_is_the_factor_that_spoiled_calibrated_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert calibration.temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    assert calibration.temperature(logits, logits.argmax(1)) == pytest.approx(1 / calibration.SHARPEST)


def test_figures_of_logits():
    # Of either confidence, 0.8 and 0.6, three of four rows are right: gaps of 5 and 15 points.
    logits = torch.tensor([[0.8, 0.2]] * 4 + [[0.6, 0.4]] * 4).log()
    labels = torch.tensor([0, 0, 0, 1] * 2)
    found = calibration.figures(logits, labels, 2.0)
    assert found.error == 25 and found.ece == pytest.approx(10, abs=1e-4)
    assert found.nll == pytest.approx(-(3 * math.log(0.8 * 0.6) + math.log(0.2 * 0.4)) / 8)
    assert found.scaled_nll == pytest.approx(torch.nn.functional.cross_entropy(logits / 2, labels).item())
    assert found.q_hat == pytest.approx(mk.q_hat(logits, labels).abs().mean().item())


@pytest.mark.parametrize("method", images_plan.KEY, ids=images_summary.label)
def test_a_method_trains_by_its_own_batch_and_batch_norm(method, monkeypatch):
    seen, weights = [], []
    criterion = mk.MixupELoss

    def watched(eta, clean_weight):
        assert eta == method.eta
        weights.append(clean_weight)
        return criterion(eta, clean_weight=clean_weight)

    monkeypatch.setattr(mk, "MixupELoss", watched)
    model = images.build("small CNN", "digits", 0)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    step = images.make_step(method.policy, model, images.optimizer_of(model), 1.0, method.eta)
    parts = images.split("digits", 0)
    assert step(parts.x_train[:128], parts.train[:128]).isfinite()
    clean = round(128 * method.fraction)
    assert seen == ([128, clean] if method == AUTHORS else [128 + clean]) and weights == [method.gamma]
    apart = any("Split" in type(layer).__name__ for layer in model.modules())
    assert apart == (method.name == "split")


def test_mixup_gives_a_second_row_whose_statistics_are_those_of_clean_rows():
    cell = Cell("digits", "small CNN", 1.0, MIXUP, 20)
    mixup, updated = images.train(cell, 0)
    assert (mixup.method, updated.method, mixup.seconds) == ("mixup", "update_bn", updated.seconds)
    assert mixup.first_variance < 0.93 and updated.first_variance == pytest.approx(1, abs=0.01)
    assert images_plan.key_of(mixup) == (cell, 0)


def test_a_seed_trains_the_same_network_again():
    cell = Cell("digits", "small CNN", 1.0, RECIPE, 2)
    (first,), (second,) = images.train(cell, 1), images.train(cell, 1)
    first.seconds = second.seconds = 0.0
    assert first == second


def costs_of(data_set="digits", network="small CNN"):
    forms = {(m.name, m.fraction) for m in (*images_plan.KEY, *images_plan.grid(), UPDATE_BN)}
    return [Cost(data_set, network, name, fraction, 1 + fraction, 1.0, 2.0) for name, fraction in sorted(forms)]


def test_plan_has_each_cell_once_and_trains_as_long_as_mixup():
    cells = images_plan.plan(costs_of(), ["digits"], ["small CNN"])
    assert len(cells) == len(set(cells))
    assert {cell.epochs for cell in cells if cell.method == AUTHORS} == {30, 15}
    assert {cell.epochs for cell in cells if cell.method == RECIPE} == {30, 24}
    assert {cell.alpha for cell in cells if cell.method == ERM} == {0.0}
    assert {cell.epochs for cell in cells if cell.method == ERM} == {30}
    quarter = {cell.method for cell in cells if cell.method.fraction == 1 / 4 and cell.alpha == 1}
    assert len(quarter) == 2 * 3 * 4


def run(method, seed, error, alpha=1.0, epochs=30, validation=0.0):
    figures = dict.fromkeys(("validation_nll", "nll", "ece", "temperature", "scaled_nll", "q_hat"), 0.0)
    where = {**method._asdict(), "method": method.name}
    del where["name"]
    return Run("digits", "small CNN", alpha, **where, epochs=epochs, seed=seed, validation_error=validation,
               test_error=error, first_variance=1.0, seconds=1.0, **figures)  # fmt: skip


def test_differences_are_paired_by_seed_and_by_budget():
    runs = [run(MIXUP, seed, error) for seed, error in enumerate((4.0, 6.0, 8.0))]
    runs += [run(RECIPE, seed, error) for seed, error in ((2, 8.0), (0, 3.0), (1, 4.0))]
    runs += [run(RECIPE, seed, 9.0, epochs=24) for seed in range(3)]
    runs += [run(ERM, seed, 5.0, alpha=0.0) for seed in range(3)]
    runs += [run(AUTHORS, seed, 7.0) for seed in range(2)]
    rows = {(images_summary.method_of(row), row.budget): row for row in images_summary.summarise(runs, costs_of())}
    recipe = rows[RECIPE, "epochs"]
    assert (recipe.error, recipe.error_less_mixup, recipe.seeds) == (5.0, -1.0, 3)
    assert recipe.error_less_mixup_error == pytest.approx(1 / 3**0.5)
    assert recipe.error_less_authors == pytest.approx(-3.5)  # of the two seeds that both have
    assert rows[RECIPE, "time"].epochs == 24 and rows[RECIPE, "time"].error_less_mixup == 3.0
    assert rows[ERM, "time"].error_less_mixup == -1.0  # ERM's step costs what Mixup's costs: no second training
    assert (AUTHORS, "time") not in rows and rows[RECIPE, "time"].error_less_authors is None


def test_choice_looks_at_validation_only():
    other = RECIPE._replace(gamma=0.0)
    runs = [run(RECIPE, 0, 1.0, validation=3.0), run(other, 0, 9.0, validation=2.0)]
    runs += [run(RECIPE, 1, 5.0, validation=1.0), run(other, 1, 2.0, validation=2.0)]
    chosen = images_summary.choose([{r.seed: r for r in runs if r.gamma == gamma} for gamma in (RECIPE.gamma, 0.0)])
    assert {seed: row.test_error for seed, row in chosen.items()} == {0: 9.0, 1: 5.0}


@pytest.mark.parametrize(
    "mean, error, said",
    [(-1.0, 0.4, "better"), (-1.0, 0.5, "level"), (1.0, 0.5, "level"), (1.0, 0.4, "worse"), (None, None, "not run")],
)
def test_verdict_is_two_standard_errors(mean, error, said):
    assert images_summary.verdict(mean, error) == said


def test_bars_name_the_places_that_miss_them():
    runs = [run(MIXUP, seed, error) for seed, error in enumerate((4.0, 6.0, 8.0))]
    runs += [run(RECIPE, seed, error) for seed, error in enumerate((5.0, 7.1, 9.0))]
    by_name = {bar.what: bar for bar in images_summary.bars(images_summary.summarise(runs, costs_of()))}
    worse = by_name["not worse than Mixup, equal epochs"]
    assert not worse.met and worse.not_at == "digits, small CNN, α = 1"
    assert by_name["a step at most 1.3 × Mixup's"].met  # costs_of says 1.25
    dear = [Cost(c.data_set, c.network, c.method, c.fraction, 1.31, 1.0, 2.0) for c in costs_of()]
    assert not images_summary.bars(images_summary.summarise(runs, dear))[0].met


def test_images_run_and_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "measure_costs", lambda data_set, network, rounds: costs_of(data_set, network))
    monkeypatch.setattr(images_plan, "grid", lambda: [RECIPE._replace(eta=eta) for eta in images_plan.ETAS])
    arguments = ["images", "--sets", "digits", "--networks", "small CNN", "--seeds", "2", "--epochs", "1"]
    arguments += ["--out", str(tmp_path)]
    assert quality.main(arguments) == 0
    store = tmp_path / "runs.csv"
    first = results.read_csv(store, Run)
    assert (
        len({images_plan.key_of(row) for row in first}) == len(first) == 2 * (8 + 7 + 3 + 2)
    )  # ERM is α's of none, Mixup has two rows
    for name in ("images-alpha-1.png", "images-alpha-0.2.png", "summary.csv"):
        assert (tmp_path / name).stat().st_size > 3_000
    results.write_csv(store, [row for row in first if row.method != "split" or row.seed], Run)
    assert quality.main(arguments) == 0
    again = results.read_csv(store, Run)
    for row in (*first, *again):
        row.seconds = 0.0
    assert sorted(map(repr, again)) == sorted(map(repr, first))


def test_costs_are_of_every_form_that_is_trained():
    torch.set_num_threads(1)
    measured = images.measure_costs("digits", "small CNN", rounds=2)
    methods = {*images_plan.KEY, *images_plan.grid(), UPDATE_BN}
    assert {(cost.method, cost.fraction) for cost in measured} == {method[:2] for method in methods}
    assert all(cost.median == 1 for cost in measured if cost.method == "mixup")
    pass_over_rows = images_plan.cost_of(measured, "digits", "small CNN", UPDATE_BN)
    assert 1 < pass_over_rows < 1 + 2 / images_plan.NETWORKS["small CNN"].epochs
    assert images_plan.cost_of(measured, "digits", "small CNN", Method("joint", 1.0)) > 1.1


def test_committed_rows_are_the_whole_plan():
    costs, runs = results.read_csv(COMMITTED / "costs.csv", Cost), results.read_csv(COMMITTED / "runs.csv", Run)
    keys = list(map(images_plan.key_of, runs))
    planned = images_plan.plan(costs, list(image_data.SETS), list(images_plan.NETWORKS))
    planned += [cell._replace(method=UPDATE_BN) for cell in planned if cell.method == MIXUP]
    assert set(keys) == {(cell, seed) for cell in planned for seed in range(images_plan.SEEDS)}
    assert len(set(keys)) == len(keys)


def test_committed_tables_are_of_the_committed_rows():
    costs, runs = results.read_csv(COMMITTED / "costs.csv", Cost), results.read_csv(COMMITTED / "runs.csv", Run)
    summaries = images_summary.summarise(runs, costs)
    assert results.read_csv(COMMITTED / "summary.csv", images_summary.Summary) == summaries
    assert results.read_csv(COMMITTED / "bars.csv", images_summary.Bar) == images_summary.bars(summaries)
