"""Graphs (MixupE §4.4): a GIN of five layers, mixed at the read-out by ``draw`` and ``apply``, ten folds.

Adam at 0.01, halved every 50 epochs; α and η are set, not chosen, since the folds have no validation part. A fold's test graphs are
judged after the last epoch. Folds are stratified, the same for all methods, and differences are paired by fold. Batches are put together
on the CPU, where their sizes are known.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixupe_kernels as mk

from . import data, frame, sources

FOLDS, LAYERS, BATCH, RATE = 10, 5, 64, 0.01
# name → (mixes, α, η)
METHODS = {
    "ERM": (False, 1.0, 0.0),
    "Mixup, α = 0.2": (True, 0.2, 0.0),
    "Mixup, α = 1": (True, 1.0, 0.0),
    "MixupE, α = 0.2": (True, 0.2, 1e-3),
    "MixupE, α = 1": (True, 1.0, 1e-3),
    "MixupE, α = 1, η = 1": (True, 1.0, 1.0),
}


class Gin(nn.Module):
    """Graph isomorphism network (Xu et al., 2019): sums over neighbours, a perceptron with BatchNorm a layer, sums over the nodes."""

    def __init__(self, features: int, hidden: int, classes: int):
        super().__init__()
        sizes = [features] + [hidden] * LAYERS
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(a, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, b),
                nn.BatchNorm1d(b),
                nn.ReLU(),
            )
            for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.head = nn.Sequential(
            nn.Linear(LAYERS * hidden, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, classes)
        )

    def read_out(self, graphs: sources.Graphs) -> Tensor:
        """(G, LAYERS · hidden): the sums of every layer's nodes."""
        x, count, found = graphs.x, len(graphs.labels), []
        for layer in self.layers:
            x = layer(x.index_add(0, graphs.edges[1], x[graphs.edges[0]]))
            found.append(x.new_zeros(count, x.shape[1]).index_add(0, graphs.graph, x))
        return torch.cat(found, 1)

    def forward(self, graphs: sources.Graphs) -> Tensor:
        return self.head(self.read_out(graphs))


def folds(labels: Tensor, seed: int = 0) -> list[Tensor]:
    """Ten parts with the classes' shares: rows of each class are dealt out in turn."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    return [by_class[fold::FOLDS] for fold in range(FOLDS)]


def train(graphs: sources.Graphs, fold: int, method: str, options: frame.Options) -> tuple[float, float]:
    """(test error in percent after the last epoch, its mean over the last tenth of the epochs)."""
    mixes, alpha, eta = METHODS[method]
    parts = folds(graphs.labels)
    held, device = sources.part_of(graphs, parts[fold]).to(options.device), options.device
    rest = torch.cat([part for index, part in enumerate(parts) if index != fold])
    torch.manual_seed(fold)
    model = Gin(graphs.x.shape[1], options.pick(8, 32, 64), graphs.classes).to(device)
    mixer = (mk.MixupE if eta else mk.Mixup)(alpha, generator=frame.generator(fold, device))
    criterion, order = mk.MixupELoss(eta), frame.generator(fold)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    epochs, errors = options.length(1, 100, 350), []
    for _ in range(epochs):
        model.train()
        for rows in data.batches(len(rest), BATCH, order):
            batch = sources.part_of(graphs, rest[rows]).to(device)
            optimizer.zero_grad()
            if mixes:
                draw = mixer.draw(batch.labels)
                loss = criterion(model.head(mixer.apply(draw, model.read_out(batch))), draw.target)
            else:
                loss = F.cross_entropy(model(batch), batch.labels)
            loss.backward()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            errors.append(100 * (model(held).argmax(1) != held.labels).float().mean().item())
    late = errors[-max(1, epochs // 10) :]
    return errors[-1], sum(late) / len(late)


def cells(options: frame.Options) -> list[str]:
    return [f"{graphs.name}: {method}" for graphs in sources.graphs(options.data) for method in METHODS]


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    name, method = cell.split(": ")
    (graphs,) = (graphs for graphs in sources.graphs(options.data) if graphs.name == name)
    rows = []
    for fold in range(options.pick(2, FOLDS)):
        error, late = train(graphs, fold, method, options)
        rows.append({"data_set": name, "method": method, "seed": fold, "error": error, "late": late})
    return rows


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    for name in frame.distinct(rows, "data_set"):
        for method in METHODS:
            own, erm = (frame.column(rows, "late", data_set=name, method=m) for m in (method, "ERM"))
            base = "Mixup" + method.removeprefix("MixupE").removesuffix(", η = 1") if "MixupE" in method else None
            less = frame.difference(own, frame.column(rows, "late", data_set=name, method=base)) if base else "–"
            lines.append([f"{name}: {method}", frame.pm(frame.column(rows, "error", data_set=name, method=method)), frame.pm(own),
                          "" if method == "ERM" else frame.difference(own, erm), less])  # fmt: skip
    return frame.Lines(("", "error, last epoch, %", "mean of the last tenth", "less ERM", "less Mixup, the same α"), lines,
                       "Mean ± standard error of the folds, paired by fold. The paper says that MixupE improves on Mixup here too.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    names = frame.distinct(rows, "data_set")
    figure.set_size_inches(2 + 4 * len(names), 3.6)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for place, method in enumerate(METHODS):
            values = frame.column(rows, "late", data_set=name, method=method)
            mean, error = frame.mean_error(values)
            axis.plot(values, [place] * len(values), ".", color="lightgrey")
            axis.errorbar(mean, place, xerr=error, fmt="o", color=f"C{place}")
        axis.set_yticks(range(len(METHODS)), list(METHODS))
        axis.invert_yaxis()
        axis.set_title(f"{name}, ten folds (grey) and their mean")
        axis.set_xlabel("test error, mean of the last tenth of the epochs, %")
