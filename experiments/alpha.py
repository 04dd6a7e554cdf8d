"""The generalization gap against α (Kimura, 2021, Table 1): test loss less training loss.

The training loss is taken of clean training rows, and of mixed ones, as training sees it. The two answer differently: mixed
targets have an entropy of their own that no network can get below, and it grows with α.
"""

import torch

import mixupe_kernels as mk

from . import batched, frame, sets

ALPHAS = (0.0, 0.1, 0.2, 0.4, 1.0, 2.0, 4.0, 8.0)  # 0 is ERM
PAPER = {0.1: 0.006, 4.0: 0.130}
KINDS = {"clean": "clean training rows", "mixed": "mixed training rows"}


def cells(options: frame.Options) -> list[str]:
    return [f"{alpha:g}" for alpha in options.pick((0.0, 1.0), ALPHAS)]


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    alpha, table = float(cell), sets.digits_table(options)
    parts = sets.stacked(table, options, rows=1000)
    network = sets.networks(parts)
    objective = batched.mixup(alpha) if alpha else batched.erm
    batched.trained(network, parts.x_train, parts.train, objective, options.length(3, 100, 200))
    clean = batched.losses(network, parts.x_train, parts.train)
    mixed, entropy = clean, torch.zeros_like(clean)
    if alpha:
        draws, law, passes = (
            batched.Draws(range(1000, 1000 + options.seeds), options.device),
            mk.sampling.Beta(alpha),
            options.pick(2, 100),
        )
        mixed = torch.zeros_like(clean)
        with torch.no_grad():
            for _ in range(passes):
                x, rows = batched.mixed(parts.x_train, parts.train, law, draws)
                mixed += batched.cross_entropy(network(x), rows)[0].mean(1) / passes
                different = (rows.labels != rows.partner_labels) * torch.special.entr(rows.lam)
                other = (rows.labels != rows.partner_labels) * torch.special.entr(1 - rows.lam)
                entropy += (different + other).mean(1) / passes
    figures = {
        "error": batched.errors(network, parts.x_test, parts.test), "test": batched.losses(network, parts.x_test, parts.test),
        "clean": clean, "mixed": mixed, "target_entropy": entropy,
    }  # fmt: skip
    return [
        {
            "data_set": table.name,
            "alpha": alpha,
            "seed": seed,
            **{name: value[seed].item() for name, value in figures.items()},
        }
        for seed in range(options.seeds)
    ]


def gaps(rows: list[frame.Row], alpha: float, kind: str) -> list[float]:
    """|test loss − training loss| of each seed."""
    test, train = (frame.column(rows, name, alpha=alpha) for name in ("test", kind))
    return [abs(a - b) for a, b in zip(test, train, strict=True)]


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    for alpha in frame.distinct(rows, "alpha"):
        figures = [
            frame.pm(frame.column(rows, name, alpha=alpha), 3) for name in ("test", "clean", "mixed", "target_entropy")
        ]
        lines.append([
            f"{alpha:g}" if alpha else "ERM", frame.pm(frame.column(rows, "error", alpha=alpha)), *figures,
            *(frame.pm(gaps(rows, alpha, kind), 3) for kind in KINDS), f"{PAPER[alpha]:.3f}" if alpha in PAPER else "–",
        ])  # fmt: skip
    return frame.Lines(
        ("α", "error, %", "test loss", "clean train loss", "mixed train loss", "entropy of mixed targets", "gap to clean", "gap to mixed", "paper's gap"),
        lines, f"{frame.distinct(rows, 'data_set')[0]}, 1000 training rows at most; the paper's is CIFAR-10; gaps are absolute.",
    )  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(10, 3.6)
    left, right = figure.subplots(1, 2)
    alphas = [alpha for alpha in frame.distinct(rows, "alpha") if alpha]

    def line(axis, values, label, **style):
        means, errors = zip(*map(frame.mean_error, values), strict=True)
        axis.errorbar(alphas, means, errors, marker=".", label=label, **style)

    for name, label in (("test", "test"), ("clean", "training, clean rows"), ("mixed", "training, mixed rows"),
                        ("target_entropy", "entropy of mixed targets")):  # fmt: skip
        line(left, [frame.column(rows, name, alpha=alpha) for alpha in alphas], label)
    for kind, label in KINDS.items():
        line(right, [gaps(rows, alpha, kind) for alpha in alphas], f"against {label}")
    right.plot(list(PAPER), list(PAPER.values()), "k*", label="the paper's (CIFAR-10)")
    erm = frame.mean_error(gaps(rows, 0.0, "clean"))[0]
    right.axhline(erm, color="grey", linewidth=0.8, linestyle=":", label="ERM")
    left.set_ylabel("cross-entropy")
    right.set_ylabel("|test loss − training loss|")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("α")
        axis.legend()
