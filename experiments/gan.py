"""Mixup for generative adversarial networks (mixup §3.7): the discriminator is trained on mixes of real and generated points.

Without: the discriminator's targets are 1 for real and 0 for generated points. With: it sees λx + (1 − λ)g(z) with target λ, λ ~ Beta(α, α).
Both networks are perceptrons of three hidden layers, on the two sets of two dimensions that are usual here. The distance is
the energy distance of 1000 generated points to 1000 others of the data; modes are those of the ring that have their share of points.
"""

import math

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import mixupe_kernels as mk

from . import batched, frame

DATA = ("ring", "spiral")
ALPHAS = (0.0, 0.2, 1.0)
NAMES = {0.0: "plain", 0.2: "mixup, α = 0.2", 1.0: "mixup, α = 1"}
NOISE, HIDDEN, BATCH, SHOWN = 2, (64, 64, 64), 64, 400
COLUMNS = ("kind", "data", "alpha", "seed", "step", "distance", "modes", "x", "y")


def cells(options: frame.Options) -> list[str]:
    return [f"{data} {alpha:g}" for data in DATA for alpha in ALPHAS]


def _row(**values) -> frame.Row:
    return {name: values.get(name, "") for name in COLUMNS}


def real(data: str, count: int, draws: batched.Draws) -> torch.Tensor:
    """(E, count, 2): eight Gaussians on a ring of radius 2, deviation 0.1; or a spiral of the same size."""
    noise, places = draws.normal((count, 2)), draws.uniform((count, 1))
    if data == "ring":
        angle = (8 * places).floor() * (math.pi / 4)
        radius = 2.0
    else:
        angle = 1.5 * math.pi * (1 + 2 * places)
        radius = angle / (4.5 * math.pi) * 2.2
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 2) + (0.1 if data == "ring" else 0.05) * noise


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """2E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ of each seed's points, (E,)."""
    return 2 * torch.cdist(x, y).mean((1, 2)) - torch.cdist(x, x).mean((1, 2)) - torch.cdist(y, y).mean((1, 2))


def modes(x: torch.Tensor) -> torch.Tensor:
    """How many of the ring's 8 have at least a quarter of their share of the points within 0.4, (E,)."""
    angles = torch.arange(8, device=x.device) * (math.pi / 4)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    near = (torch.cdist(x, centres.expand(len(x), -1, -1)) < 0.4).float().mean(1)
    return (near > 0.25 / 8).sum(1)


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    data, alpha = cell.split(" ")[0], float(cell.split(" ")[1])
    seeds, device = range(options.seeds), options.device
    generator = batched.Networks(seeds, (NOISE, *HIDDEN, 2), device=device)
    discriminator = batched.Networks(range(1000, 1000 + options.seeds), (2, *HIDDEN, 1), device=device)
    ways = {"lr": 1e-3, "betas": (0.5, 0.999)}
    of_generator = torch.optim.Adam(generator.parameters, **ways, fused=True)
    of_discriminator = torch.optim.Adam(discriminator.parameters, **ways, fused=True)
    draws, law = batched.Draws(seeds, device), mk.sampling.Beta(alpha) if alpha else None
    rows, steps, looks = [], options.length(20, 4000, 20_000), 8
    checks = batched.Draws(range(2000, 2000 + options.seeds), device)
    others = real(data, 1000, checks)
    noise = checks.normal((1000, NOISE))
    for step in range(1, steps + 1):
        x, fake = real(data, BATCH, draws), generator(draws.normal((BATCH, NOISE))).detach()
        if law:
            lam = draws.lam(law, (BATCH, 1))
            loss = bce(discriminator(torch.lerp(fake, x, lam)), lam)
        else:
            out = discriminator(torch.cat([x, fake], 1))
            loss = bce(out, torch.cat([torch.ones_like(lam := out[:, :BATCH]), torch.zeros_like(lam)], 1))
        of_discriminator.zero_grad()
        (options.seeds * loss).backward()
        of_discriminator.step()
        out = discriminator(generator(draws.normal((BATCH, NOISE))))
        of_generator.zero_grad()
        (options.seeds * bce(out, torch.ones_like(out))).backward()
        of_generator.step()
        if step % max(1, steps // looks) == 0:
            with torch.no_grad():
                made = generator(noise)
            figures = torch.stack([energy_distance(made, others), modes(made).float()], 1).tolist()
            rows += [_row(kind="distance", data=data, alpha=alpha, seed=seed, step=step, distance=d, modes=m if data == "ring" else "")
                     for seed, (d, m) in enumerate(figures)]  # fmt: skip
    rows += [_row(kind=kind, data=data, alpha=alpha, seed=0, x=round(x, 3), y=round(y, 3))
             for kind, points in (("made", made), ("real", others)) for x, y in points[0, :SHOWN].tolist()]  # fmt: skip
    return rows


def table(rows: list[frame.Row]) -> frame.Lines:
    lines, figures = [], frame.select(rows, kind="distance")
    steps = frame.distinct(figures, "step")
    for data in DATA:
        base = frame.column(figures, "distance", data=data, alpha=0.0, step=steps[-1])
        for alpha in ALPHAS:
            where = {"data": data, "alpha": alpha}
            last = frame.column(figures, "distance", **where, step=steps[-1])
            late = [
                frame.mean_error(frame.column(figures, "distance", **where, step=step))[0]
                for step in steps[len(steps) // 2 :]
            ]
            lines.append([
                f"{data}, {NAMES[alpha]}", frame.pm(last, 3), frame.difference(last, base, 3) if alpha else "",
                f"{min(late):.3f} … {max(late):.3f}",
                frame.pm(frame.column(figures, "modes", **where, step=steps[-1]), 1) + " of 8" if data == "ring" else "",
                "more stable" if alpha else "less stable",
            ])  # fmt: skip
    return frame.Lines(
        ("", "energy distance, end", "less plain", "its means, second half", "modes", "paper (pictures)"), lines
    )


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(11, 5.6)
    axes = figure.subplots(2, 4)
    for line, data in zip(axes, DATA, strict=True):
        true = frame.select(rows, kind="real", data=data, alpha=0.0)
        for axis, alpha in zip(line, ALPHAS, strict=False):
            made = frame.select(rows, kind="made", data=data, alpha=alpha)
            for points, colour, name in ((true, "lightgrey", "data"), (made, "tab:blue", "generated")):
                axis.scatter([r["x"] for r in points], [r["y"] for r in points], s=3, color=colour, label=name)
            axis.set_title(f"{data}: {NAMES[alpha]}, seed 0", fontsize=8)
            axis.set_xlim(-3, 3)
            axis.set_ylim(-3, 3)
            axis.set_aspect("equal")
        own = frame.select(rows, kind="distance", data=data)
        steps = frame.distinct(own, "step")
        for alpha in ALPHAS:
            values = [frame.column(own, "distance", alpha=alpha, step=step) for step in steps]
            means, errors = np.array([frame.mean_error(value) for value in values]).T
            line[3].errorbar(steps, means, errors, marker=".", label=NAMES[alpha])
        line[3].set_yscale("log")
        line[3].set_title("energy distance to the data, all seeds", fontsize=8)
        line[3].set_xlabel("step")
    axes[0, 0].legend()
    axes[0, 3].legend()
