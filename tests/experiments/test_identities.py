"""What must hold exactly in the experiments: the papers' identities, and parts of the code against their definitions."""

import pytest
import torch
import torch.nn.functional as F

import mixupe_kernels as mk
from experiments import (
    ablation,
    adversarial,
    approximation,
    batched,
    between,
    frame,
    gan,
    graphs,
    image_sets,
    images,
    learned,
    memorization,
    perturbed,
    sets,
    sources,
    speech,
    table4,
    toy,
    variance,
)

from . import folders

QUICK = frame.Options(quick=True, seeds=2)


def test_mixup_is_a_perturbed_risk():
    risk, mean, covariance = perturbed.identities()
    assert risk["left"] == pytest.approx(risk["right"], rel=1e-10)
    assert mean["left"] < 1e-14 and covariance["left"] < 1e-13
    for name in perturbed.LAWS:
        (row,) = perturbed.moments(name, 10**5)
        assert row["theta_mean"] == pytest.approx(row["drawn_mean"], abs=3e-3)
        assert row["theta_variance"] == pytest.approx(row["drawn_variance"], abs=1e-3)


def test_mixing_takes_w_of_the_total_variance():
    x, law = torch.randn(200, 3, dtype=torch.float64), mk.sampling.Beta(0.5)
    mixed = variance.mixed_sets(x - x.mean(0), law, 2000, torch.Generator().manual_seed(0)).flatten(0, 1)
    left = mixed.square().sum(1).mean() / (x - x.mean(0)).square().sum(1).mean()
    assert left.item() == pytest.approx(1 - law.expected_a_lambda, abs=5e-3)


def test_the_bound_holds_with_the_total_variance_alone():
    rows = variance.simulate(32, QUICK)
    assert all(row["coordinate"] < row["before"] - row["after"] < row["total"] for row in rows)


def test_curvature_is_the_hessian():
    weight, x, labels = torch.randn(4, 3).double(), torch.randn(7, 4).double(), torch.randint(3, (7,))
    hessian = torch.func.hessian(lambda w: F.cross_entropy(x @ w, labels))(weight).reshape(12, 12)
    trace, largest = variance.curvature(weight, x)
    assert trace == pytest.approx(hessian.trace().item()) and largest == pytest.approx(
        torch.linalg.eigvalsh(hessian)[-1].item()
    )


def test_alpha_is_1_without_biases_and_q_hat_is_exact():
    network = torch.nn.Sequential(
        torch.nn.Linear(5, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 3, bias=False)
    ).double()
    x, labels = torch.randn(40, 5).double(), torch.randint(3, (40,))
    figures = approximation.measure(network, x - x.mean(0), labels, 0)
    assert all(figures[f"alpha_{q}"] == pytest.approx(1) for q in (5, 50, 95))
    assert figures["correlation"] == pytest.approx(1) and figures["exact"] == pytest.approx(figures["approximate"])


def test_the_first_order_is_all_of_an_infinitesimal_mix(monkeypatch):
    monkeypatch.setattr(approximation, "SHARES", (1e-5,))
    network = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    figures = approximation.measure(network, torch.randn(400, 5).double(), torch.randint(3, (400,)), 0)
    # Partners are drawn, so that the difference is the first order but for their chance.
    assert figures["difference_1e-05"] == pytest.approx(figures["first_order_1e-05"], rel=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_largest_margin_is_larger_than_any_other(seed):
    x, labels = toy.separable(seed)
    best = toy.largest_margin(x, labels)
    others = F.normalize(torch.randn(20_000, 2, dtype=torch.float64), dim=1)
    margin = (labels * (x @ best)).min()
    assert (
        margin >= (labels * (others @ x.T)).amin(1).max() - 1e-9
        and margin > 0.3
        and best.norm().item() == pytest.approx(1)
    )


def test_all_pairs_are_mixup_in_expectation():
    x, labels = toy.separable(0)
    inputs, targets, weights = toy.all_pairs(x, labels)
    w = torch.randn(2, dtype=torch.float64)

    def loss(inputs, targets):
        return F.binary_cross_entropy_with_logits(inputs @ w, targets, reduction="none")

    generator = torch.Generator().manual_seed(0)
    i, j = torch.randint(len(x), (2, 400_000), generator=generator)
    lam = torch.rand(400_000, dtype=torch.float64, generator=generator)
    drawn = loss(lam[:, None] * x[i] + (1 - lam[:, None]) * x[j], (lam * labels[i] + (1 - lam) * labels[j] + 1) / 2)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights * loss(inputs, targets)).sum().item() == pytest.approx(
        drawn.mean().item(), abs=4 * drawn.std().item() / 632
    )


def test_mixup_s_norm_levels_off_and_erm_s_does_not():
    steps = {method: toy.linear(method, QUICK) for method in ("ERM", "Mixup")}
    grows = {m: [b["norm"] / a["norm"] for a, b in zip(r[:2], r[2:], strict=True)] for m, r in steps.items()}
    assert max(grows["Mixup"]) < min(grows["ERM"])


def test_jacobian_norms():
    network, x = batched.Networks(range(2), (4, 6, 3)), torch.randn(2, 5, 4)
    norms = between.jacobian_norms(network, x)
    jacobian = torch.autograd.functional.jacobian(network, x)  # (2, 5, 3, 2, 5, 4)
    for seed in range(2):
        for row in range(5):
            assert norms[seed, row].item() == pytest.approx(jacobian[seed, row, :, seed, row].norm().item(), rel=1e-4)


def test_attacks_stay_within_their_step_and_raise_the_loss():
    network, x, labels = batched.Networks(range(2), (4, 16, 3)), torch.randn(2, 30, 4), torch.randint(3, (2, 30))
    step = torch.rand(2, 1, 4) / 10
    for times in (1, 10):
        moved = adversarial.attack(network, x, labels, step, times)
        assert ((moved - x).abs() <= step + 1e-6).all()
        assert (batched.losses(network, moved, labels) > batched.losses(network, x, labels)).all()
    assert torch.equal(adversarial.attack(network, x, labels, 0 * step, 1), x)


def test_mixing_within_a_class_changes_no_label():
    x, labels = torch.randn(2, 40, 4), torch.randint(3, (2, 40))
    network = batched.Networks(range(2), (4, 8, 3))
    for kind in ("SC + RP", "SC + KNN"):
        partner = ablation.pairs(kind, x, labels, batched.Draws(range(2)))
        assert torch.equal(labels.gather(1, partner), labels)
        both = [
            ablation.mixing(kind, inputs_only=only)(network, x, labels, batched.Draws(range(2)))
            for only in (False, True)
        ]
        torch.testing.assert_close(*both)
    partner = ablation.pairs("different class", x, labels, batched.Draws(range(2)))
    assert (labels.gather(1, partner) != labels).all()


def test_neighbours_are_near():
    x, labels = torch.randn(2, 60, 4), torch.randint(3, (2, 60))
    partner = ablation.pairs("AC + KNN", x, labels, batched.Draws(range(2)))
    distances = torch.cdist(x, x)
    rank = (distances < distances.gather(2, partner.unsqueeze(2))).sum(2)
    assert (rank >= 1).all() and (rank <= ablation.NEIGHBOURS).all() and (partner != torch.arange(60)).all()


def test_hidden_layers_are_mixed_after_their_nonlinearity():
    x, labels, network = torch.randn(2, 40, 4), torch.randint(3, (2, 40)), batched.Networks(range(2), (4, 8, 8, 3))
    values = [ablation.mixing(layer=layer)(network, x, labels, batched.Draws(range(2))) for layer in range(3)]
    assert not torch.allclose(values[0], values[1]) and not torch.allclose(values[1], values[2])
    torch.testing.assert_close(values[0], batched.mixup(1.0)(network, x, labels, batched.Draws(range(2))))


def test_smoothing_is_torch_s():
    logits, labels = torch.randn(2, 5, 4), torch.randint(4, (2, 5))
    value = ablation.smoothed(logits, batched.plain(labels), 0.1)
    expected = torch.stack([F.cross_entropy(a, b, label_smoothing=0.1) for a, b in zip(logits, labels, strict=True)])
    torch.testing.assert_close(value, expected)


def test_the_distance_and_the_modes_of_the_data_itself():
    x = gan.real("ring", 2000, batched.Draws(range(2)))
    other = gan.real("ring", 2000, batched.Draws(range(5, 7)))
    assert (gan.modes(x) == 8).all() and gan.energy_distance(x, x).abs().max() < 1e-5
    assert (gan.energy_distance(x, other) < 0.02).all() and (gan.energy_distance(x, other + 1) > 0.3).all()


def test_the_meta_gradient_is_that_of_the_validation_loss_after_a_step():
    x, labels, network = torch.randn(2, 30, 4), torch.randint(3, (2, 30)), batched.Networks(range(2), (4, 8, 3))
    own = [parameter.detach().clone() for parameter in network.parameters]
    law = learned.Learned(2, x, labels)
    lam = torch.full((2,), 0.3, requires_grad=True)
    gradient = law.gradient(network, x, labels, batched.Draws(range(2)), lam, lam)

    def after(lam):  # by hand, in float64
        parameters = [p.double().requires_grad_() for p in own]
        inputs, partner = x.double(), batched.Draws(range(2)).partners(30)
        mixed = lam * inputs + (1 - lam) * batched.gather(inputs, partner)
        log_p = network(mixed, parameters=parameters).log_softmax(2)
        loss = -(
            lam * log_p.gather(2, labels[..., None]) + (1 - lam) * log_p.gather(2, labels.gather(1, partner)[..., None])
        ).mean((1, 2))
        moved = [
            p - learned.TRIAL_RATE * g
            for p, g in zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True)
        ]
        held = -network(inputs, parameters=moved).log_softmax(2).gather(2, labels[..., None]).mean((1, 2))
        return held.detach()

    slope = (after(0.3 + 1e-4) - after(0.3 - 1e-4)) / 2e-4
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-2, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(own, network.parameters, strict=True))


def test_choices_look_at_validation_rows_alone():
    rows = [{"data_set": "s", "policy": "full", "seed": seed, "eta": eta, "validation": v, "error": e}
            for seed in range(2) for eta, v, e in ((0.1, 5.0, 9.0), (1.0, 4.0, 30.0), (2.0, 4.0, 1.0))]  # fmt: skip
    assert table4.chosen(rows, "s", "full") == [30.0, 30.0] and table4.unchosen(rows, "s", 0.1) == [9.0, 9.0]


def test_corrupted_labels_are_marked():
    table = sets.digits_table(QUICK)
    clean, noisy = sets.stacked(table, QUICK), sets.stacked(table, QUICK, corrupted=0.5)
    assert torch.equal(noisy.wrong, clean.train != noisy.train) and not clean.wrong.any()
    # A tenth of the labels that are drawn are right.
    assert noisy.wrong.float().mean().item() == pytest.approx(0.45, abs=0.06)
    assert set(memorization.METHODS) >= {name for _, name in memorization.PAPER}


def test_graphs_are_read_as_they_are_written(tmp_path):
    (read,) = sources.graphs(folders.graphs(tmp_path))
    assert (read.name, read.classes, len(read.labels), read.x.shape[1]) == ("RINGS", 2, 30, 3)
    chosen = torch.tensor([7, 2])
    part = sources.part_of(read, chosen)
    assert torch.equal(part.labels, read.labels[chosen])
    for place, index in enumerate(chosen.tolist()):
        nodes = (part.graph == place).nonzero()[:, 0]
        assert len(nodes) == 4 + index % 5 and torch.equal(part.x[nodes], read.x[read.graph == index])
        degrees = part.edges[1].bincount(minlength=len(part.x))[nodes]
        assert degrees.sum().item() == 2 * len(nodes) + 2 * (index % 2)


def test_a_gin_knows_no_order(tmp_path):
    (read,) = sources.graphs(folders.graphs(tmp_path))
    torch.manual_seed(0)
    model = graphs.Gin(3, 8, 2).eval()
    order = torch.randperm(len(read.x))
    place = order.argsort()
    shuffled = read._replace(x=read.x[order], graph=read.graph[order], edges=place[read.edges])
    torch.testing.assert_close(model(shuffled), model(read))
    for fold in graphs.folds(read.labels):
        assert read.labels[fold].float().mean().item() == pytest.approx(0.5, abs=0.2)


def test_utterances_are_read_as_they_are_written(tmp_path):
    read = sources.utterances(folders.utterances(tmp_path))
    assert (read.name, read.classes, read.x_train.shape, read.x_test.shape) == (
        "JapaneseVowels",
        3,
        (12, 1, 12, 10),
        (12, 1, 12, 10),
    )
    assert read.train.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    torch.testing.assert_close(read.x_train.mean((0, 3)), torch.zeros(1, 12), rtol=0, atol=1e-5)
    for network in speech.PAPER:
        assert speech.build(network, read, QUICK)(read.x_train).shape == (12, 3)


def test_cifar_is_read_from_its_folder(tmp_path):
    assert image_sets.in_folder(folders.cifar10(tmp_path, 20)) == ["cifar-10-batches-py"]
    read = image_sets.from_folder(tmp_path, "cifar-10-batches-py")
    assert read.x_train.shape == (100, 3, 32, 32) and read.x_test.shape == (20, 3, 32, 32) and read.classes == 10
    torch.testing.assert_close(read.x_train.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    options = frame.Options(data=tmp_path)
    assert "cifar-10-batches-py | PreActResNet-18 | MixupE" in images.cells(options)


@pytest.mark.parametrize("method", ["ERM + R", "MixupE 1/4, γ = 1/4"])
def test_color_images_are_trained_as_the_small_ones(tmp_path, monkeypatch, method):
    def tiny(classes):
        layers = [
            torch.nn.Conv2d(3, 4, 3, stride=4),
            torch.nn.BatchNorm2d(4),
            torch.nn.Flatten(),
            torch.nn.Linear(256, classes),
        ]
        return torch.nn.Sequential(*layers)

    monkeypatch.setitem(images.LARGE, "PreActResNet-18", images.Training(tiny, (1, 1), 100))
    image_sets.from_folder.cache_clear()
    options = frame.Options(quick=True, seeds=1, data=folders.cifar10(tmp_path, 20))
    rows = images.run(f"cifar-10-batches-py | PreActResNet-18 | {method}", options)
    assert [row["kind"] for row in rows] == ["end"] + ["deformed"] * len(image_sets.DEFORMATIONS)
    assert all(0 <= row["error"] <= 100 and row["test_loss"] > 0 for row in rows)


def test_deformations_and_crops():
    for make, expected in ((image_sets.rotation(90), [0.0, -1, 1, 0]), (image_sets.zoom(2), [0.5, 0, 0, 0.5]),
                           (image_sets.shear(45), [1.0, 1, 0, 1])):  # fmt: skip
        torch.testing.assert_close(make(torch.ones(1)), torch.tensor([expected]), rtol=0, atol=1e-5)
    for name in image_sets.DEFORMATIONS:
        moved = image_sets.deformed(torch.ones(5, 1, 14, 14), name, torch.Generator().manual_seed(0))
        torch.testing.assert_close(moved, torch.ones(5, 1, 14, 14))
    column = torch.arange(16.0).view(1, 1, 1, 16).expand(64, 3, 16, 16)
    crops = image_sets.augmented(column, torch.Generator().manual_seed(0))
    steps = crops.diff(dim=3)[:, :, :, 4:11]
    assert crops.shape == column.shape and set(steps.unique().tolist()) == {-1.0, 1.0}  # flipped, or not; whole steps
