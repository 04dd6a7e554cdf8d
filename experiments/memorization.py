"""Random labels (mixup §3.4): how much of them mixup, dropout and ERM learn.

Labels of a share of the training rows are drawn uniformly. Error on clean test rows at the best and at the last epoch (the best
one is found on test rows, as in the paper, and says how much early stopping could have saved), and the error on the training
rows against the labels that are right, and against those that are wrong.
"""

import torch

from . import batched, frame, sets

SHARES = (0.2, 0.5, 0.8)
METHODS = {
    "ERM": (0.0, 0.0),
    "dropout": (0.0, 0.5),
    "Mixup, α = 1": (1.0, 0.0),
    "Mixup, α = 2": (2.0, 0.0),
    "Mixup, α = 8": (8.0, 0.0),
    "Mixup, α = 32": (32.0, 0.0),
    "Mixup, α = 8, dropout": (8.0, 0.3),
}
# mixup, Table 2 (CIFAR-10, PreActResNet-18): best, last, training error on real and on corrupt labels; α as in the paper, whose
# dropout alone is of 0.7 at 20 % and of 0.8 above. Every figure was compared with the text of arXiv 1710.09412v2.
PAPER = {
    (0.2, "ERM"): (12.7, 16.6, 0.05, 0.28), (0.2, "dropout"): (8.8, 10.4, 5.26, 83.55),
    (0.2, "Mixup, α = 8"): (5.9, 6.4, 2.27, 86.32),
    (0.5, "ERM"): (18.8, 44.6, 0.26, 0.64), (0.5, "dropout"): (14.1, 15.5, 12.71, 86.98),
    (0.5, "Mixup, α = 32"): (11.3, 12.7, 5.84, 85.71), (0.5, "Mixup, α = 8, dropout"): (10.9, 10.9, 7.56, 87.90),
    (0.8, "ERM"): (36.5, 73.9, 0.62, 0.83), (0.8, "dropout"): (30.9, 35.1, 29.84, 86.37),
    (0.8, "Mixup, α = 32"): (25.3, 30.9, 18.92, 85.44), (0.8, "Mixup, α = 8, dropout"): (24.0, 24.8, 19.70, 87.67),
}  # fmt: skip
HIDDEN = (256, 256)


def cells(options: frame.Options) -> list[str]:
    shares = options.pick((0.5,), SHARES)
    return [f"{share:g} {name}" for share in shares for name in METHODS]


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    share_text, name = cell.split(" ", 1)
    share, (alpha, dropout) = float(share_text), METHODS[name]
    table = sets.digits_table(options)
    parts = sets.stacked(table, options, corrupted=share)
    network = sets.networks(parts, HIDDEN, dropout)
    objective = batched.mixup(alpha) if alpha else batched.erm
    test = []
    for trained in batched.train(network, parts.x_train, parts.train, objective, options.length(3, 40, 200)):
        test.append(batched.errors(trained, parts.x_test, parts.test))
    best, last = torch.stack(test).min(0).values, test[-1]
    with torch.no_grad():
        missed = (network(parts.x_train).argmax(2) != parts.train).float()
    real = 100 * (missed * ~parts.wrong).sum(1) / (~parts.wrong).sum(1)
    corrupt = 100 * (missed * parts.wrong).sum(1) / parts.wrong.sum(1)
    return [
        {"data_set": table.name, "corrupted": share, "method": name, "seed": seed, "best": b, "last": e, "real": r, "corrupt": c}
        for seed, (b, e, r, c) in enumerate(torch.stack([best, last, real, corrupt], 1).tolist())
    ]  # fmt: skip


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    for share in frame.distinct(rows, "corrupted"):
        for name in frame.distinct(rows, "method"):
            chosen = frame.select(rows, corrupted=share, method=name)
            ours = [frame.pm(frame.column(chosen, figure), 1) for figure in ("best", "last", "real", "corrupt")]
            paper = PAPER.get((share, name))
            lines.append([f"{share:.0%}", name, *ours, " / ".join(f"{value:g}" for value in paper) if paper else "–"])
    return frame.Lines(
        ("labels drawn", "method", "best, %", "last, %", "train, right labels", "train, wrong labels", "paper (CIFAR-10)"), lines,
        f"{frame.distinct(rows, 'data_set')[0]}; error in percent, mean ± standard error of {len(frame.distinct(rows, 'seed'))} seeds. "
        "The paper's are mixup's Table 2 (arXiv 1710.09412v2), whose dropout alone is of 0.7 at 20 % and of 0.8 above, and of 0.5 here.",
    )  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    shares, methods = frame.distinct(rows, "corrupted"), frame.distinct(rows, "method")
    figure.set_size_inches(3.6 * len(shares) + 1.6, 3.6)
    axes = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axis, share in zip(axes, shares, strict=True):
        for place, name in enumerate(methods):
            for figure_name, colour, shift in (("best", "tab:green", 0.2), ("last", "tab:red", -0.2)):
                mean, error = frame.mean_error(frame.column(rows, figure_name, corrupted=share, method=name))
                label = f"{figure_name} epoch" if not place else None
                axis.barh(place + shift, mean, 0.38, xerr=error, color=colour, label=label)
        axis.set_title(f"{share:.0%} of training labels drawn at random")
        axis.set_xlabel("error on clean test rows, %")
        axis.set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    axes[-1].legend(loc="lower right")
