"""What mixing does to complexity and curvature (Kimura, 2021): Theorem 2 by simulation, and the Hessian.

Rademacher complexity of linear functions with ‖w‖ ≤ 1 is E‖Σ σ_i x_i‖ / n. Mixing takes (1 − w) of the total variance, the trace of
the covariance, w = 2E[λ(1 − λ)]; so the complexity falls by at most √(w · total variance / n). With the variance of one coordinate
in its place, as the theorem reads for inputs of more than one, the bound fails. The Hessian of a linear classifier's loss
follows the second moment of its inputs, which mixing shrinks towards that of the mean, as long as its probabilities stay: it shrinks by
(1 − w) at W = 0. Of a trained classifier mixed rows lie closer to the boundary, where the curvature is largest, and the two nearly cancel.
"""

import torch

import mixupe_kernels as mk

from . import batched, data, frame

ALPHAS = (0.1, 0.2, 0.5, 1.0, 2.0, 8.0, 32.0)
DIMENSIONS = (1, 2, 8, 32, 128)
ROWS = 64
COLUMNS = ("kind", "dimension", "alpha", "seed", "before", "after", "total", "coordinate")


def _row(**values) -> frame.Row:
    return {name: values.get(name, "") for name in COLUMNS}


def cells(options: frame.Options) -> list[str]:
    dimensions, alphas = options.pick((2, 32), DIMENSIONS), options.pick((1.0,), ALPHAS)
    return [f"complexity {d}" for d in dimensions] + [f"hessian {alpha:g}" for alpha in alphas]


def complexity(x: torch.Tensor, draws: int, generator: torch.Generator) -> float:
    """E‖Σ σ_i x_i‖ / n over the signs; x (n, d), or (draws, n, d) for rows that are drawn again each time."""
    signs = torch.randint(0, 2, (draws, x.shape[-2]), generator=generator).double() * 2 - 1
    sums = torch.einsum("kn,knd->kd", signs, x) if x.dim() == 3 else signs @ x
    return sums.norm(dim=1).mean().item() / x.shape[-2]


def mixed_sets(x: torch.Tensor, law: mk.sampling.Distribution, draws: int, generator: torch.Generator) -> torch.Tensor:
    """(draws, n, d): each row with a λ and a partner of its own among all rows."""
    partner = torch.randint(len(x), (draws, len(x)), generator=generator)
    lam = law.sample((draws, len(x), 1), generator, torch.device("cpu")).double()
    return lam * x + (1 - lam) * x[partner]


def simulate(dimension: int, options: frame.Options) -> list[frame.Row]:
    rows, draws = [], options.pick(500, 4000)
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(ROWS, dimension, dtype=torch.float64, generator=generator) + 0.3
        before = complexity(x, draws, generator)
        variance = x.var(0, correction=0)
        for alpha in options.pick((1.0,), ALPHAS):
            law = mk.sampling.Beta(alpha)
            after = complexity(mixed_sets(x, law, draws, generator), draws, generator)
            total, coordinate = ((law.expected_a_lambda * v / ROWS) ** 0.5 for v in (variance.sum(), variance.mean()))
            rows.append(_row(kind="complexity", dimension=dimension, alpha=alpha, seed=seed, before=before, after=after,
                             total=total.item(), coordinate=coordinate.item()))  # fmt: skip
    return rows


def curvature(weight: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    """(trace, largest eigenvalue) of the Hessian in W of mean cross-entropy of xW: E[(diag p − ppᵀ) ⊗ xxᵀ], free of the labels."""
    p = (x @ weight).softmax(1)
    blocks = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    hessian = torch.einsum("ncd,ni,nj->cidj", blocks, x, x).flatten(2).flatten(0, 1) / len(x)
    return hessian.trace().item(), torch.linalg.eigvalsh(hessian)[-1].item()


def hessians(alpha: float, options: frame.Options) -> list[frame.Row]:
    """Before: at clean rows. After: at mixed rows, of a classifier trained on clean rows and of one trained on mixed ones."""
    rows, law, splits = (
        [],
        mk.sampling.Beta(alpha),
        [data.split(data.bundled("wine"), seed) for seed in range(options.seeds)],
    )
    x, labels = (torch.stack([getattr(s, name) for s in splits]).to(options.device) for name in ("x_train", "train"))
    for name, objective in (("W = 0", None), ("ERM", batched.erm), ("Mixup", batched.mixup(alpha))):
        network = batched.Networks(range(options.seeds), (x.shape[2], 3), device=options.device)
        if objective:
            batched.trained(network, x, labels, objective, options.length(2, 60), rate=1e-2)
        else:
            network.parameters[0] = torch.zeros_like(network.parameters[0])
        for seed in range(options.seeds):
            weight, own = network.parameters[0][seed].detach().cpu().double(), x[seed].cpu().double()
            generator = torch.Generator().manual_seed(seed)
            mixed = mixed_sets(own, law, options.pick(2, 40), generator).flatten(0, 1)
            for kind, figure in (("trace", 0), ("largest eigenvalue", 1)):
                before, after = (curvature(weight, part)[figure] for part in (own, mixed))
                rows.append(_row(kind=f"Hessian's {kind}, {name}", dimension=x.shape[2], alpha=alpha, seed=seed,
                                 before=before, after=after))  # fmt: skip
    return rows


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    kind, value = cell.split(" ")
    return simulate(int(value), options) if kind == "complexity" else hessians(float(value), options)


def drops(rows: list[frame.Row], **where) -> list[float]:
    return [row["before"] - row["after"] for row in frame.select(rows, **where)]


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    simulated = frame.select(rows, kind="complexity")
    for dimension in frame.distinct(simulated, "dimension"):
        for alpha in (alpha for alpha in frame.distinct(simulated, "alpha") if alpha in (0.1, 1.0, 32.0)):
            where = {"dimension": dimension, "alpha": alpha}
            bounds = [frame.mean_error(frame.column(simulated, name, **where))[0] for name in ("total", "coordinate")]
            fall = frame.mean_error(drops(simulated, **where))[0]
            holds = ["holds" if fall <= bound else "fails" for bound in bounds]
            lines.append([f"complexity's fall, d = {dimension}, α = {alpha:g}", frame.pm(drops(simulated, **where), 4),
                          *(f"≤ {bound:.4f} {word}" for bound, word in zip(bounds, holds, strict=True))])  # fmt: skip
    for kind in frame.distinct(rows, "kind")[1:]:
        for alpha in (a for a in frame.distinct(frame.select(rows, kind=kind), "alpha") if a in (0.1, 1.0, 32.0)):
            before, after = (frame.column(rows, name, kind=kind, alpha=alpha) for name in ("before", "after"))
            shrink = 1 - mk.expected_a_lambda(alpha)
            lines.append([f"{kind}, α = {alpha:g}", frame.pm([b / a for a, b in zip(before, after, strict=True)], 3) + " of clean",
                          f"1 − w = {shrink:.3f}", ""])  # fmt: skip
    return frame.Lines(("", "ours", "with the total variance", "with one coordinate's"), lines,
                       "Complexity of 64 Gaussian points, ‖w‖ ≤ 1; Hessians of a linear classifier on wine at mixed rows.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(10.5, 3.6)
    left, right = figure.subplots(1, 2)
    simulated = frame.select(rows, kind="complexity")
    dimensions = frame.distinct(simulated, "dimension")
    alpha = 1.0
    for name, values in (
        ("fall of the complexity", [drops(simulated, dimension=d, alpha=alpha) for d in dimensions]),
        (
            "bound by the total variance",
            [frame.column(simulated, "total", dimension=d, alpha=alpha) for d in dimensions],
        ),
        (
            "bound by one coordinate's",
            [frame.column(simulated, "coordinate", dimension=d, alpha=alpha) for d in dimensions],
        ),
    ):
        means, errors = zip(*map(frame.mean_error, values), strict=True)
        left.errorbar(dimensions, means, errors, marker=".", label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("dimension, α = 1")
    left.set_title("Rademacher complexity, 64 points")
    left.legend()
    alphas = [a for a in frame.distinct(rows, "alpha") if frame.select(rows, kind="Hessian's trace, ERM", alpha=a)]
    for kind in frame.distinct(rows, "kind")[1:]:
        values = []
        for alpha in alphas:
            before, after = (frame.column(rows, name, kind=kind, alpha=alpha) for name in ("before", "after"))
            values.append([b / a for a, b in zip(before, after, strict=True)])
        means, errors = zip(*map(frame.mean_error, values), strict=True)
        right.errorbar(alphas, means, errors, marker=".", label=kind)
    right.plot(
        alphas,
        [1 - mk.expected_a_lambda(a) for a in alphas],
        "k--",
        linewidth=0.8,
        label="1 − w, the share of variance left",
    )
    right.set_xscale("log")
    right.set_xlabel("α")
    right.set_title("Hessian at mixed rows over that at clean rows")
    right.legend(fontsize=7, loc="upper right", bbox_to_anchor=(1, 0.62))
