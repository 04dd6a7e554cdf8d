"""What is mixed with what (mixup §3.8, Table 5): inputs only, the nearer label, classes, neighbours, layers, smoothing, noise.

SC mixes within a class and AC across all; RP takes any partner and KNN one of the 20 nearest rows of the batch (the paper: of the 200
nearest of the set). Inputs only keeps the label of the nearer sample. Layers mix hidden representations instead of inputs. α = 1.
"""

from collections.abc import Callable

import torch

import mixupe_kernels as mk

from . import batched, frame, sets

ALPHA, NEIGHBOURS = 1.0, 20
LAW = mk.sampling.Beta(ALPHA)
SAME, OTHER = mk.pairing.same_class, mk.pairing.different_class
# mixup, Table 5: test error on CIFAR-10, PreActResNet-18, weight decay 1e-4; compared with the text of arXiv 1710.09412v2. Its layers
# are the inputs of residual blocks.
PAPER = {
    "ERM": 5.53, "mixup, AC + RP": 4.24, "AC + KNN": 4.98, "layer 1": 4.44, "layer 2": 4.56, "inputs only, SC + KNN": 5.45,
    "inputs only, AC + KNN": 5.43, "inputs only, SC + RP": 5.23, "inputs only, AC + RP": 5.17, "smoothing 0.05": 5.25,
    "smoothing 0.1": 5.33, "smoothing 0.2": 5.34, "inputs only + smoothing 0.1": 5.08, "noise 0.05": 5.53, "noise 0.1": 6.41,
    "noise 0.2": 7.16,
}  # fmt: skip


def pairs(kind: str, x: torch.Tensor, labels: torch.Tensor, draws: batched.Draws) -> torch.Tensor:
    """A partner for each row of each seed's batch, (E, N)."""
    if kind == "AC + RP":
        return draws.partners(labels.shape[1])
    if kind in ("SC + RP", "different class"):
        pair = SAME if kind == "SC + RP" else OTHER
        return torch.stack(
            [
                pair(len(own), generator, own.device, own)
                for own, generator in zip(labels, draws.generators, strict=True)
            ]
        )
    distances = torch.cdist(x, x)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    if kind == "SC + KNN":
        distances = distances.masked_fill(labels.unsqueeze(2) != labels.unsqueeze(1), torch.inf)
    count = min(NEIGHBOURS, labels.shape[1] - 1)
    nearest = distances.topk(count, largest=False)
    # A class may have fewer rows in a batch: the pick is among those at a finite distance; a row alone is its own partner.
    finite = nearest.values.isfinite().sum(2)
    pick = (draws.uniform(labels.shape[1:]) * finite).long().unsqueeze(2)
    own = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return torch.where(finite > 0, nearest.indices.gather(2, pick).squeeze(2), own)


def smoothed(logits: torch.Tensor, rows: batched.Rows, smoothing: float) -> torch.Tensor:
    ce, _ = batched.cross_entropy(logits, rows)
    return ((1 - smoothing) * ce - smoothing * logits.log_softmax(2).mean(2)).mean(1)


def mixing(kind: str = "AC + RP", inputs_only: bool = False, smoothing: float = 0.0, layer: int = 0) -> Callable:
    """Mixup with one λ a batch; ``layer`` is how many layers lie before the mixing."""

    def objective(network, x, labels, draws):
        partner = pairs(kind, x, labels, draws)
        lam = draws.lam(LAW)[:, None].expand(labels.shape)
        # After the ReLU: before it, a hidden layer is linear in the inputs, and mixing it is mixing them.
        hidden = batched.mix(network(x, 0, layer).relu() if layer else x, partner, lam)
        rows = batched.Rows(labels, labels.gather(1, partner), lam)
        if inputs_only:
            rows = batched.plain(torch.where(lam > 0.5, rows.labels, rows.partner_labels))
        return smoothed(network(hidden, layer), rows, smoothing)

    return objective


def smoothing(share: float) -> Callable:
    return lambda network, x, labels, draws: smoothed(network(x), batched.plain(labels), share)


def noise(deviation: float) -> Callable:
    """Noise of that share of each feature's own deviation, which is 1 here."""
    return lambda network, x, labels, draws: batched.erm(
        network, x + deviation * draws.normal(x.shape[1:]), labels, draws
    )


METHODS = {
    "ERM": batched.erm,
    "mixup, AC + RP": mixing(),
    "AC + KNN": mixing("AC + KNN"),
    "SC + RP": mixing("SC + RP"),
    "different class": mixing("different class"),
    "layer 1": mixing(layer=1),
    "layer 2": mixing(layer=2),
    "inputs only, AC + RP": mixing(inputs_only=True),
    "inputs only, SC + RP": mixing("SC + RP", inputs_only=True),
    "inputs only, AC + KNN": mixing("AC + KNN", inputs_only=True),
    "inputs only, SC + KNN": mixing("SC + KNN", inputs_only=True),
    "inputs only + smoothing 0.1": mixing(inputs_only=True, smoothing=0.1),
    "smoothing 0.05": smoothing(0.05),
    "smoothing 0.1": smoothing(0.1),
    "smoothing 0.2": smoothing(0.2),
    "noise 0.05": noise(0.05),
    "noise 0.1": noise(0.1),
    "noise 0.2": noise(0.2),
    "MixupE": batched.mixupe(ALPHA, 1e-3),
}


def cells(options: frame.Options) -> list[str]:
    return list(METHODS)


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    table = sets.digits_table(options)
    parts = sets.stacked(table, options, rows=1000)
    network = sets.networks(parts)
    batched.trained(network, parts.x_train, parts.train, METHODS[cell], options.length(1, 60, 200))
    figures = zip(
        batched.errors(network, parts.x_test, parts.test),
        batched.losses(network, parts.x_test, parts.test),
        strict=True,
    )
    return [
        {"data_set": table.name, "method": cell, "seed": seed, "error": error.item(), "nll": nll.item()}
        for seed, (error, nll) in enumerate(figures)
    ]


def table(rows: list[frame.Row]) -> frame.Lines:
    base, lines = frame.column(rows, "error", method="ERM"), []
    for method in frame.distinct(rows, "method"):
        values = frame.column(rows, "error", method=method)
        paper = PAPER.get(method)
        less = (
            [frame.difference(values, base), f"{paper - PAPER['ERM']:+.2f}" if paper else "–"]
            if method != "ERM"
            else ["", ""]
        )
        lines.append([method, frame.pm(values), less[0], frame.pm(frame.column(rows, "nll", method=method), 3),
                      f"{paper:.2f}" if paper else "–", less[1]])  # fmt: skip
    return frame.Lines(("", "error, %", "less ERM", "NLL", "paper (CIFAR-10)", "paper, less ERM"), lines,
                       f"{frame.distinct(rows, 'data_set')[0]}, 1000 training rows at most. The paper's are mixup's Table 5 (arXiv 1710.09412v2), weight decay 1e-4.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(9, 5)
    axes, methods = figure.subplots(1, 1), frame.distinct(rows, "method")[1:]
    base = frame.column(rows, "error", method="ERM")
    for place, method in enumerate(methods):
        mean, error = frame.paired(frame.column(rows, "error", method=method), base)
        axes.barh(place, mean, xerr=error, color="tab:green" if mean < 0 else "tab:red", label=None)
        if method in PAPER:
            axes.plot(
                PAPER[method] - PAPER["ERM"],
                place,
                "k*",
                label="the paper's, on CIFAR-10" if method == "mixup, AC + RP" else None,
            )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel("test error less ERM's, points; left is better")
    axes.set_title(f"{frame.distinct(rows, 'data_set')[0]}, 1000 training rows at most")
    axes.legend()
