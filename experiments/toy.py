"""Mixup on two-dimensional data: decision boundaries (mixup Fig. 1b) and what a linear classifier converges to (slides).

A logistic regression without regularization on separable points: ERM's norm grows without end, like log t, and its direction creeps to
that of the largest margin. Mixup's loss has a finite minimum, so its norm levels off, and its direction with it.
"""

import numpy as np
import torch

import mixupe_kernels as mk

from . import batched, frame

LINEAR = ("ERM", "Mixup", "MixupE")
STEPS = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
NETWORKS = {
    "ERM": batched.erm,
    "Mixup": batched.mixup(1.0),
    "MixupE": batched.mixupe(1.0, 1e-3),
    "MixupE, η = 1": batched.mixupe(1.0, 1.0),
}
COLUMNS = ("kind", "method", "seed", "step", "norm", "angle", "margin_gap", "error", "band", "x", "y", "p")
GRID = 41


def _row(**values) -> frame.Row:
    return {name: values.get(name, "") for name in COLUMNS}


def cells(options: frame.Options) -> list[str]:
    return [f"linear {name}" for name in LINEAR] + [f"boundary {name}" for name in NETWORKS]


def separable(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """20 points of two classes with a margin of at least 0.3 about a line through 0; labels −1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, dtype=torch.float64, generator=generator)
    normal /= normal.norm()
    x = 2 * torch.randn(400, 2, dtype=torch.float64, generator=generator)
    x = x[(x @ normal).abs() > 0.3]
    labels = (x @ normal).sign()
    chosen = torch.cat([(labels == side).nonzero()[:10, 0] for side in (-1, 1)])
    return x[chosen], labels[chosen]


def largest_margin(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The direction, of length 1, of the largest margin through 0, by a scan of angles that is narrowed."""
    middle, width = 0.0, np.pi
    for _ in range(12):
        angles = torch.linspace(middle - width, middle + width, 721, dtype=torch.float64)
        directions = torch.stack([angles.cos(), angles.sin()], 1)
        best = (labels * (directions @ x.T)).amin(1).argmax()
        middle, width = angles[best].item(), width / 50
    return directions[best]


def all_pairs(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixup's training set without chance: every pair and a grid of λ: inputs, targets in [0, 1], weights that sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    lam, weights = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    y = (labels + 1) / 2
    share = lam.view(-1, 1, 1)
    inputs = share.unsqueeze(-1) * x[None, :, None] + (1 - share.unsqueeze(-1)) * x[None, None]
    targets = share * y[None, :, None] + (1 - share) * y[None, None]
    each = (weights / len(x) ** 2).view(-1, 1, 1).expand_as(targets)
    return inputs.reshape(-1, 2), targets.reshape(-1), each.reshape(-1)


def linear(method: str, options: frame.Options) -> list[frame.Row]:
    """Gradient descent with the whole objective in every step; the seeds' weights are rows of one matrix."""
    steps, eta = options.pick((10, 100), STEPS), 1e-3 if method == "MixupE" else 0.0
    data = [separable(seed) for seed in range(options.seeds)]
    sets = [all_pairs(*pair) if method != "ERM" else (pair[0], (pair[1] + 1) / 2, torch.full((len(pair[1]),), 1 / len(pair[1])).double())
            for pair in data]  # fmt: skip
    inputs, targets, weights = (torch.stack(parts) for parts in zip(*sets, strict=True))
    x, labels = (torch.stack(parts) for parts in zip(*data, strict=True))
    best = torch.stack([largest_margin(*pair) for pair in data])
    margins = (labels * torch.einsum("end,ed->en", x, best)).amin(1)
    w, rows = torch.zeros(options.seeds, 2, dtype=torch.float64), []
    regularizer = eta * mk.expected_a_lambda(1.0)
    for step in range(1, steps[-1] + 1):
        z = torch.einsum("end,ed->en", inputs, w)
        gradient = torch.einsum("en,end->ed", weights * (z.sigmoid() - targets), inputs)
        if eta:  # of η w mean |q̂|, q̂ = (y − σ(z))z = |…| of clean rows
            z = torch.einsum("end,ed->en", x, w)
            p, y = z.sigmoid(), (labels + 1) / 2
            slope = ((y - p) - z * p * (1 - p)) * ((y - p) * z).sign()
            gradient += regularizer * torch.einsum("en,end->ed", slope, x) / x.shape[1]
        w -= 0.5 * gradient
        if step in steps:
            norm = w.norm(dim=1)
            angle = torch.rad2deg(((w * best).sum(1) / norm).clamp(-1, 1).arccos())
            gap = margins - (labels * torch.einsum("end,ed->en", x, w)).amin(1) / norm
            rows += [
                _row(kind="linear", method=method, seed=seed, step=step, norm=n, angle=a, margin_gap=g)
                for seed, (n, a, g) in enumerate(torch.stack([norm, angle, gap], 1).tolist())
            ]
    return rows


def boundary(method: str, options: frame.Options) -> list[frame.Row]:
    """Two moons of 100 points; the band is the share of the square where the network is less than 90 % sure."""
    from sklearn.datasets import make_moons

    def moons(count, seed):
        x, labels = make_moons(count, noise=0.2, random_state=seed)
        return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)

    made, tests = (
        [moons(100, seed) for seed in range(options.seeds)],
        [moons(2000, 10_000 + seed) for seed in range(options.seeds)],
    )
    (x, labels), (x_test, test) = (
        tuple(torch.stack(parts).to(options.device) for parts in zip(*pairs, strict=True)) for pairs in (made, tests)
    )
    network = batched.Networks(range(options.seeds), (2, 64, 64, 2), device=options.device)
    batched.trained(network, x, labels, NETWORKS[method], options.length(5, 1500), batch=50)
    ticks = torch.linspace(-2, 3, GRID), torch.linspace(-1.5, 2, GRID)
    grid = torch.stack(torch.meshgrid(*ticks, indexing="xy"), 2).view(1, -1, 2).expand(options.seeds, -1, -1)
    grid = grid.to(options.device)
    with torch.no_grad():
        p = network(grid).softmax(2)
    band = 100 * (p.amax(2) < 0.9).float().mean(1)
    error = batched.errors(network, x_test, test)
    rows = [_row(kind="boundary", method=method, seed=seed, error=e, band=b)
            for seed, (e, b) in enumerate(torch.stack([error, band], 1).tolist())]  # fmt: skip
    rows += [_row(kind="grid", method=method, seed=0, x=x, y=y, p=round(value, 4))
             for (x, y), value in zip(grid[0].tolist(), p[0, :, 1].tolist(), strict=True)]  # fmt: skip
    rows += [_row(kind="points", method=method, seed=0, x=x, y=y, p=label)
             for (x, y), label in zip(x[0].tolist(), labels[0].tolist(), strict=True)]  # fmt: skip
    return rows


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    kind, method = cell.split(" ", 1)
    return linear(method, options) if kind == "linear" else boundary(method, options)


def table(rows: list[frame.Row]) -> frame.Lines:
    lines, last = [], max(row["step"] for row in frame.select(rows, kind="linear"))
    steps = sorted({row["step"] for row in frame.select(rows, kind="linear")})
    for method in LINEAR:
        where = {"kind": "linear", "method": method, "step": last}
        grows = frame.mean_error(frame.column(rows, "norm", **where))[0] - frame.mean_error(
            frame.column(rows, "norm", **{**where, "step": steps[-2]}))[0]  # fmt: skip
        lines.append([
            f"linear, {method}, {last} steps", f"norm {frame.pm(frame.column(rows, 'norm', **where))}",
            f"{frame.pm(frame.column(rows, 'angle', **where))}° from the largest margin",
            f"margin gap {frame.pm(frame.column(rows, 'margin_gap', **where), 4)}",
            f"norm {grows:+.3f} since step {steps[-2]}",
        ])  # fmt: skip
    for method in NETWORKS:
        where = {"kind": "boundary", "method": method}
        lines.append([f"moons, {method}", f"error {frame.pm(frame.column(rows, 'error', **where))} %",
                      f"unsure on {frame.pm(frame.column(rows, 'band', **where))} % of the square", "", ""])  # fmt: skip
    return frame.Lines(("", "ours", "", "", ""), lines, "The papers show pictures: mixup's boundary is wide; the slides say ERM's direction "
                       "goes to the largest margin. Mixup's norm levels off, and its angle stays where it is.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(12, 6.2)
    axes = figure.subplots(2, 12)
    grid = axes[0, 0].get_gridspec()
    for axis in axes.flat:
        axis.remove()
    for index, method in enumerate(NETWORKS):
        axis = figure.add_subplot(grid[0, 3 * index : 3 * index + 3])
        x, y, p = (
            np.array(frame.column(rows, name, kind="grid", method=method)).reshape(GRID, GRID)
            for name in ("x", "y", "p")
        )
        axis.contourf(x, y, p, levels=np.linspace(0, 1, 11), cmap="RdBu_r", alpha=0.8)
        axis.contour(x, y, p, levels=[0.5], colors="black", linewidths=1)
        points = frame.select(rows, kind="points", method=method)
        axis.scatter(
            [r["x"] for r in points],
            [r["y"] for r in points],
            c=[r["p"] for r in points],
            cmap="RdBu_r",
            s=14,
            edgecolors="white",
            linewidths=0.4,
        )
        axis.set_title(f"{method}: probability of red" if not index else method)
        axis.set_xticks([])
        axis.set_yticks([])
    for index, (name, title) in enumerate(
        (
            ("norm", "norm of the weights"),
            ("angle", "angle to the largest margin, °"),
            ("margin_gap", "largest margin − margin"),
        )
    ):
        axis = figure.add_subplot(grid[1, 4 * index : 4 * index + 4])
        for method in LINEAR:
            own = frame.select(rows, kind="linear", method=method)
            steps = frame.distinct(own, "step")
            means, errors = zip(*(frame.mean_error(frame.column(own, name, step=step)) for step in steps), strict=True)
            axis.errorbar(
                steps,
                means,
                errors,
                marker=".",
                linestyle="--" if method == "MixupE" else "-",
                label=f"linear, {method}",
            )
        axis.set_xscale("log")
        axis.set_xlabel("step of gradient descent")
        axis.set_title(title)
    axis.legend()
