"""Between training samples (mixup Fig. 2): what networks say at λx_i + (1 − λ)x_j, and how steep they are there.

A prediction is a miss if it is neither of the pair's classes. The gradient norm is that of the Jacobian of the logits in the inputs,
by Frobenius; the pairs are of different classes.
"""

import torch

from . import batched, frame, sets

METHODS = {
    "ERM": batched.erm,
    "Mixup": batched.mixup(1.0),
    "MixupE": batched.mixupe(1.0, 1e-3),
    "MixupE, η = 1": batched.mixupe(1.0, 1.0),
}
LAMBDAS = tuple(step / 10 for step in range(11))


def cells(options: frame.Options) -> list[str]:
    return list(METHODS)


def jacobian_norms(network: batched.Networks, x: torch.Tensor) -> torch.Tensor:
    """‖J_f(x)‖ of every row, (E, n)."""
    x = x.detach().requires_grad_()
    logits = network(x)
    squares = 0.0
    for k in range(logits.shape[2]):
        (gradient,) = torch.autograd.grad(logits[..., k].sum(), x, retain_graph=True)
        squares = squares + gradient.square().sum(2)
    return squares.sqrt()


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    table = sets.digits_table(options)
    parts = sets.stacked(table, options, rows=1000)
    network, device = sets.networks(parts), options.device
    batched.trained(network, parts.x_train, parts.train, METHODS[cell], options.length(3, 100, 200))
    pairs = options.pick(50, 2000)
    own, other = [], []
    for seed, labels in enumerate(parts.train):
        drawn = torch.randint(len(labels), (2, 4 * pairs), generator=frame.generator(seed, device), device=device)
        drawn = drawn[:, labels[drawn[0]] != labels[drawn[1]]][:, :pairs]
        own.append(drawn[0])
        other.append(drawn[1])
    own, other = torch.stack(own), torch.stack(other)
    x, y = (batched.gather(parts.x_train, index) for index in (own, other))
    first, second = (parts.train.gather(1, index) for index in (own, other))
    rows = []
    for lam in LAMBDAS:
        between = lam * x + (1 - lam) * y
        with torch.no_grad():
            p = network(between).softmax(2)
        said = p.argmax(2)
        misses = 100 * ((said != first) & (said != second)).float().mean(1)
        # How far the two classes' probabilities are from λ and 1 − λ: the linearity that mixup asks for.
        ends = torch.stack([p.gather(2, c.unsqueeze(2)).squeeze(2) for c in (first, second)], 2)
        linear = (ends - ends.new_tensor([lam, 1 - lam])).abs().mean((1, 2))
        norms = jacobian_norms(network, between).mean(1)
        for seed, (miss, gap, norm) in enumerate(torch.stack([misses, linear, norms], 1).tolist()):
            rows.append(
                {
                    "data_set": table.name,
                    "method": cell,
                    "lam": lam,
                    "seed": seed,
                    "miss": miss,
                    "gap": gap,
                    "norm": norm,
                }
            )
    return rows


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    for method in frame.distinct(rows, "method"):
        own = frame.select(rows, method=method)
        middle = [frame.pm(frame.column(own, name, lam=0.5)) for name in ("miss", "gap", "norm")]
        worst = max(frame.mean_error(frame.column(own, "miss", lam=lam))[0] for lam in LAMBDAS)
        lines.append([method, *middle, f"{worst:.2f}", frame.pm(frame.column(own, "norm", lam=1.0))])
    return frame.Lines(
        ("", "misses at λ = ½, %", "|p − λ| at ½", "‖J‖ at ½", "most misses, %", "‖J‖ at samples"), lines,
        "The paper shows curves: fewer misses and smaller gradients with mixup. Pairs of training rows of different classes.",
    )  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(11, 3.5)
    titles = {
        "miss": "neither of the two classes, %",
        "gap": "|probability − share of its sample|",
        "norm": "norm of the logits' Jacobian",
    }
    for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for method in frame.distinct(rows, "method"):
            means, errors = zip(
                *(frame.mean_error(frame.column(rows, name, method=method, lam=lam)) for lam in LAMBDAS), strict=True
            )
            dashes = {"linestyle": "--", "zorder": 3} if method == "MixupE" else {}  # Mixup's lies under it
            axis.errorbar(LAMBDAS, means, errors, marker=".", label=method, **dashes)
        axis.set_xlabel("λ of λxᵢ + (1 − λ)xⱼ")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    axis.legend()
