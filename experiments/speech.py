"""Utterances (MixupE §4.3, mixup §3.3): who speaks, by LeNet, VGG-11 and VGG-13, with mixup's warm-up of five epochs on plain samples.

Adam at 1e-3 and 20 epochs, α = 0.2 and η = 0.01 as in the paper. Here the set is JapaneseVowels (9 speakers, 270 utterances to
train and 370 to test with, 12 coefficients over time), networks are narrow and batches are of 30; ``--full`` has the paper's widths.
"""

from collections.abc import Callable

import torch
from torch import nn

import mixupe_kernels as mk
from bench import models

from . import frame, sources
from .data import batches

ALPHA, ETA, EPOCHS, WARM_UP = 0.2, 0.01, 20, 5
PLANS = {"VGG-11": (1, 1, 2, 2, 2), "VGG-13": (2, 2, 2, 2, 2)}
# name → (mixer's options or None for ERM, η, γ, BatchNorm of mixed and clean rows apart)
METHODS: dict[str, tuple[Callable | None, float, float, bool]] = {
    "ERM": (None, 0.0, 0.0, False),
    "Mixup": (mk.Mixup, 0.0, 0.0, False),
    "MixupE": (mk.MixupE, ETA, 0.0, False),
    "Mixup, warm-up": (lambda **options: mk.Mixup(warmup_epochs=WARM_UP, **options), 0.0, 0.0, False),
    "MixupE, warm-up": (lambda **options: mk.MixupE(warmup_epochs=WARM_UP, **options), ETA, 0.0, False),
    "MixupE 1/4, γ = 1/4": (lambda **options: mk.MixupE(clean_fraction=1 / 4, **options), ETA, 1 / 4, True),
}
# MixupE, Table 5: test error %.
PAPER = {"LeNet": (10.43, 10.12, 10.02), "VGG-11": (6.04, 4.63, 3.93), "VGG-13": (5.77, 4.68, 3.84)}


def vgg(plan: tuple[int, ...], classes: int, base: int) -> nn.Sequential:
    """Simonyan and Zisserman (2015) with BatchNorm: so many 3×3 convolutions a stage, a pooling after each; (N, 1, H, W) → (N, classes)."""
    layers, channels = [], 1
    for stage, count in enumerate(plan):
        width = base * min(2**stage, 8)
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def small_lenet(height: int, width: int, classes: int) -> nn.Sequential:
    """LeNet's two 5×5 convolutions and a hidden layer, padded so that 12 rows last."""
    units = 16 * -(-height // 4) * -(-width // 4)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(), nn.Linear(units, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def build(network: str, data: sources.Utterances, options: frame.Options) -> nn.Sequential:
    shape = data.x_train.shape[2:]
    if network != "LeNet":
        return vgg(PLANS[network], data.classes, options.pick(4, 8, 64))
    return models.lenet(*shape, data.classes) if options.full and min(shape) > 12 else small_lenet(*shape, data.classes)


def cells(options: frame.Options) -> list[str]:
    return [f"{network}: {method}" for network in PAPER for method in METHODS]


def train(network: str, method: str, data: sources.Utterances, seed: int, options: frame.Options) -> list[float]:
    """Test error in percent after each epoch."""
    torch.manual_seed(seed)
    model = build(network, data, options).to(options.device)
    mixer, eta, gamma, apart = METHODS[method]
    generator, order = (frame.generator(seed, options.device) for _ in range(2))
    mixer = mixer(alpha=ALPHA, generator=generator) if mixer else None
    criterion = mk.MixupELoss(eta, clean_weight=gamma)
    if apart:
        mk.split_batch_norm(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    errors = []
    for epoch in range(options.length(1, EPOCHS)):
        model.train()
        if mixer:
            mixer.set_epoch(epoch)
        for rows in batches(len(data.train), options.pick(30, 30, 100), order):
            optimizer.zero_grad()
            x, target = data.x_train[rows], data.train[rows]
            if mixer:
                x, target = mixer(x, target)
            loss = criterion(mk.forward_mixupe(model, x, target if mixer else None), target)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            said = torch.cat([model(part) for part in data.x_test.split(1000)]).argmax(1)
        errors.append(100 * (said != data.test).float().mean().item())
    return errors


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    network, method = cell.split(": ")
    data = sources.utterances(options.data).to(options.device)
    return [
        {"data_set": data.name, "network": network, "method": method, "seed": seed, "epoch": epoch, "error": error}
        for seed in range(options.seeds)
        for epoch, error in enumerate(train(network, method, data, seed, options), 1)
    ]


def table(rows: list[frame.Row]) -> frame.Lines:
    last, lines = max(row["epoch"] for row in rows), []
    ends = frame.select(rows, epoch=last)
    for network, paper in PAPER.items():
        base = frame.column(ends, "error", network=network, method="Mixup")
        for method in METHODS:
            values = frame.column(ends, "error", network=network, method=method)
            place = ("ERM", "Mixup", "MixupE").index(method) if method in ("ERM", "Mixup", "MixupE") else None
            early = frame.pm(frame.column(rows, "error", network=network, method=method, epoch=min(WARM_UP, last)))
            lines.append([f"{network}: {method}", frame.pm(values), "" if method == "Mixup" else frame.difference(values, base), early,
                          "–" if place is None else f"{paper[place]:.2f}"])  # fmt: skip
    return frame.Lines(("", "test error, %", "less Mixup", f"after {min(WARM_UP, last)} epochs", "paper (commands)"), lines,
                       f"{frame.distinct(rows, 'data_set')[0]}, mean ± standard error of {len(frame.distinct(rows, 'seed'))} seeds.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(11, 3.6)
    for axis, network in zip(figure.subplots(1, 3), PAPER, strict=True):
        for method in METHODS:
            own = frame.select(rows, network=network, method=method)
            epochs = frame.distinct(own, "epoch")
            means, errors = zip(
                *(frame.mean_error(frame.column(own, "error", epoch=epoch)) for epoch in epochs), strict=True
            )
            axis.errorbar(epochs, means, errors, linewidth=1, label=method, linestyle="--" if "warm" in method else "-")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.set_xticks(range(0, max(epochs) + 1, 5))
        axis.set_title(network)
        axis.set_xlabel("epoch")
    figure.axes[0].set_ylabel("test error, %")
    figure.axes[0].legend(fontsize=7)
