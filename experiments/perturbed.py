"""Mixup as perturbed empirical risk (Carratino et al., 2022): the identity, θ's moments, and Approximated Mixup.

Mixup's risk is that of samples pulled towards the mean, x̃ = x̄ + θ̄(x − x̄), with noise of mean 0 added to inputs and labels. The
identity is checked by summing over all pairs and integrating over λ; θ's moments by drawing; and training compares ERM, Mixup and
Approximated Mixup, which keeps the pull and leaves the noise out. Networks trained on pulled inputs predict on pulled inputs.
"""

import numpy as np
import torch

import mixupe_kernels as mk

from . import batched, data, frame, sets

LAWS = {
    "Beta(0.1)": mk.sampling.Beta(0.1),
    "Beta(1/2)": mk.sampling.Beta(0.5),
    "Beta(1)": mk.sampling.Beta(1.0),
    "Beta(2)": mk.sampling.Beta(2.0),
    "Beta(8)": mk.sampling.Beta(8.0),
    "Beta(2, 5)": mk.sampling.Beta(2.0, 5.0),
    "D_λ(0.3, 2)": mk.sampling.DLambda(0.3, 2.0),
    "HalfBeta(1/2)": mk.sampling.HalfBeta(0.5),
    "WShaped(1/2)": mk.sampling.WShaped(),
    "Uniform(0.2, 0.9)": mk.sampling.Uniform(0.2, 0.9),
    "Fixed(0.7)": mk.sampling.Fixed(0.7),
}
PAPER = {"Beta(1/2)": (0.8183, 0.0237)}
METHODS = ("ERM", "Mixup", "Mixup, pulled at test", "Approximated Mixup", "Approximated Mixup, not pulled at test")
COLUMNS = ("kind", "name", "data_set", "seed", "theta_mean", "theta_variance", "drawn_mean", "drawn_variance", "left", "right",
           "error", "nll")  # fmt: skip


def _row(**values) -> frame.Row:
    return {name: values.get(name, "") for name in COLUMNS}


def moments(name: str, draws: int) -> list[frame.Row]:
    law = LAWS[name]
    lam = law.sample((draws,), torch.Generator().manual_seed(0), torch.device("cpu")).double()
    theta = torch.maximum(lam, 1 - lam)
    drawn = {"drawn_mean": theta.mean().item(), "drawn_variance": theta.var().item()}
    return [_row(kind="moments", name=name, theta_mean=law.theta_mean, theta_variance=law.theta_variance, **drawn)]


def nodes(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    x, weights = np.polynomial.legendre.leggauss(count)
    return torch.tensor((x + 1) / 2), torch.tensor(weights / 2)


def identities() -> list[frame.Row]:
    """Both sides of three identities, on 12 points and a fixed network, in float64, λ ~ Beta(2, 2)."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[torch.randint(4, (12,))]
    network = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    law, n = mk.sampling.Beta(2.0), len(x)

    def risk(inputs, targets):
        return -(targets * network(inputs).log_softmax(-1)).sum(-1)

    def density(lam):  # of Beta(2, 2)
        return 6 * lam * (1 - lam)

    lam, weights = nodes()

    def mixed(values, share):  # (K, n, n, ...) of own row i and partner j
        share = share.view(-1, 1, 1, 1)
        return share * values[None, :, None] + (1 - share) * values[None, None]

    with torch.no_grad():
        mixup = (risk(mixed(x, lam), mixed(y, lam)).mean((1, 2)) * density(lam) * weights).sum()
        # θ on [1/2, 1] has twice the density; each sample is its pulled self plus the perturbation of (θ, j).
        theta, half = (lam + 1) / 2, weights / 2
        law_of_theta = 2 * density(theta) * half
        pulled_x, pulled_y = (v.mean(0) + law.theta_mean * (v - v.mean(0)) for v in (x, y))
        delta = mixed(x, theta) - pulled_x[None, :, None]
        epsilon = mixed(y, theta) - pulled_y[None, :, None]
        perturbed = risk(pulled_x[None, :, None] + delta, pulled_y[None, :, None] + epsilon)
        perturbed = (perturbed.mean((1, 2)) * law_of_theta).sum()
        mean = torch.einsum("k,kijd->id", law_of_theta, delta) / n
        covariance = torch.einsum("k,kijd,kije->ide", law_of_theta, delta, delta) / n
        centred = x - x.mean(0)
        variance = law.theta_variance
        spread = variance + (1 - law.theta_mean) ** 2
        formula = variance * torch.einsum("id,ie->ide", centred, centred) + spread * (centred.T @ centred / n)
    return [
        _row(kind="identity", name="mixup's risk = perturbed risk", left=mixup.item(), right=perturbed.item()),
        _row(kind="identity", name="largest mean of the perturbation = 0", left=mean.abs().max().item(), right=0.0),
        _row(kind="identity", name="its covariance: largest gap to the formula = 0",
             left=(covariance - formula).abs().max().item(), right=0.0),
    ]  # fmt: skip


def train(table: data.Table, options: frame.Options) -> list[frame.Row]:
    """Three trainings for each seed: α = 1, few training rows, so that regularization counts."""
    law = mk.sampling.Beta(1.0)
    parts = sets.stacked(table, options, rows=600)
    epochs = options.length(2, 60, 200)
    means, shares = (
        parts.x_train.mean(1, keepdim=True),
        torch.nn.functional.one_hot(parts.train, parts.classes).float().mean(1),
    )
    approximations = [mk.ApproximatedMixup(x[0], y, law) for x, y in zip(means, shares, strict=True)]

    def pulled(x):
        return torch.stack([a.inputs(own) for a, own in zip(approximations, x, strict=True)])

    def approximated(network, x, labels, draws):
        targets = torch.stack([a.targets(own) for a, own in zip(approximations, labels, strict=True)])
        return -(targets * network(pulled(x)).log_softmax(2)).sum(2).mean(1)

    rows = []
    for objective, kinds in (
        (batched.erm, {"ERM": parts.x_test}),
        (batched.mixup(1.0), {"Mixup": parts.x_test, "Mixup, pulled at test": pulled(parts.x_test)}),
        (
            approximated,
            {"Approximated Mixup": pulled(parts.x_test), "Approximated Mixup, not pulled at test": parts.x_test},
        ),
    ):
        network = sets.networks(parts)
        batched.trained(network, parts.x_train, parts.train, objective, epochs)
        for name, x in kinds.items():
            figures = zip(batched.errors(network, x, parts.test), batched.losses(network, x, parts.test), strict=True)
            rows += [
                _row(kind="training", name=name, data_set=table.name, seed=seed, error=error.item(), nll=nll.item())
                for seed, (error, nll) in enumerate(figures)
            ]
    return rows


def tables(options: frame.Options) -> list[data.Table]:
    found = [data.bundled("iris")] if options.quick else [sets.digits_table(options), data.bundled("breast_cancer")]
    if options.data and not options.quick:
        found += [
            data.read_arff(path) for name in ("letter", "cmc") if (path := options.data / f"{name}.arff").exists()
        ]
    return found


def cells(options: frame.Options) -> list[str]:
    return ["identities", *(f"moments {name}" for name in LAWS), *(f"training {t.name}" for t in tables(options))]


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    kind, _, name = cell.partition(" ")
    if kind == "moments":
        return moments(name, options.pick(10**5, 10**6))
    if kind == "identities":
        return identities()
    (table,) = (table for table in tables(options) if table.name == name)
    return train(table, options)


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    for row in frame.select(rows, kind="identity"):
        lines.append([row["name"], f"{row['left']:.6g}", f"{row['right']:.6g}", "equal"])
    for row in frame.select(rows, kind="moments"):
        paper = PAPER.get(row["name"])
        lines.append([
            f"θ̄ and Var θ of {row['name']}", f"{row['theta_mean']:.4f}, {row['theta_variance']:.4f}",
            f"{row['drawn_mean']:.4f}, {row['drawn_variance']:.4f} drawn", f"{paper[0]}, {paper[1]}" if paper else "–",
        ])  # fmt: skip
    trained = frame.select(rows, kind="training")
    for name in frame.distinct(trained, "data_set"):
        of_set = frame.select(trained, data_set=name)
        base = frame.column(of_set, "error", name="ERM")
        for method in METHODS:
            values = frame.column(of_set, "error", name=method)
            less = "" if method == "ERM" else f"less ERM {frame.difference(values, base)}"
            lines.append([f"{name}, error %: {method}", frame.pm(values), less, "–"])
    return frame.Lines(
        ("", "ours", "against", "paper"), lines, "Training: 600 rows at most, α = 1, mean ± standard error."
    )


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(11, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    alphas = np.geomspace(0.05, 32, 60)
    laws = [mk.sampling.Beta(alpha) for alpha in alphas]
    left.semilogx(alphas, [law.theta_mean for law in laws], label="θ̄, the pull")
    left.semilogx(alphas, [law.theta_variance**0.5 for law in laws], label="deviation of θ, the noise")
    for name, alpha in (("Beta(0.1)", 0.1), ("Beta(1/2)", 0.5), ("Beta(1)", 1), ("Beta(2)", 2), ("Beta(8)", 8)):
        (row,) = frame.select(rows, kind="moments", name=name)
        left.plot(alpha, row["drawn_mean"], "k.")
        left.plot(alpha, row["drawn_variance"] ** 0.5, "k.")
    left.plot([0.5], PAPER["Beta(1/2)"][:1], "r*", markersize=10, label="the paper's θ̄ at ½")
    left.set_xlabel("α of λ ~ Beta(α, α); dots: drawn")
    left.legend()
    trained = frame.select(rows, kind="training")
    names = frame.distinct(trained, "data_set")
    for index, method in enumerate(METHODS):
        for place, name in enumerate(names):
            base = frame.column(trained, "error", data_set=name, name="ERM")
            mean, error = frame.paired(frame.column(trained, "error", data_set=name, name=method), base)
            if method != "ERM":
                label = method if not place else None
                right.bar(place + 0.2 * (index - 2.5), mean, 0.2, yerr=error, color=f"C{index}", label=label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(names)), names)
    right.set_ylabel("test error less ERM's, points")
    right.set_title("below 0: better than ERM")
    right.legend(fontsize=7)
