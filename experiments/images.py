"""Networks with BatchNorm (MixupE §4.1, 4.5): errors, loss curves (Fig. 1), ERM + R (Table 7), η, deformed test images (Table 8).

SGD at 0.1, momentum 0.9, weight decay 1e-4, a tenth of the rate from a half and a hundredth from three quarters of the epochs on, α = 1,
and 0.2 on Tiny-ImageNet and ImageNet. Here a small CNN and a narrow PreActResNet on small grey sets; with ``--data`` CIFAR, SVHN and
Tiny-ImageNet by PreActResNet-18, and with ``--full`` by the paper's five networks for its 200 epochs. ImageNet's folders (train/CLASS,
val/CLASS) are read as they are trained on, by ResNet-50 with batches of 256 for 100 epochs, where the paper has 100 000 of 4096.
MixupE is the authors' two calls on the whole batch.
``python -m experiments quality images`` compares every use of the clean rows, at equal time too.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

import mixupe_kernels as mk
from bench import models
from bench.methods import regularized_erm

from . import frame, image_sets, image_streams

ETA = 1e-3
ETAS = (1e-4, 1e-2, 0.1, 1.0)
# name → (kind of batch, η, γ, one call of the model, BatchNorm apart)
METHODS = {
    "ERM": ("erm", 0.0, 0.0, True, False),
    "Mixup": ("mixup", 0.0, 0.0, True, False),
    "ERM + R": ("erm_r", ETA, 0.0, True, False),
    "MixupE": ("mixupe", ETA, 0.0, False, False),
    "MixupE 1/4, γ = 1/4": ("recipe", ETA, 1 / 4, True, True),
    **{f"MixupE, η = {eta:g}": ("mixupe", eta, 0.0, False, False) for eta in (0.0, *ETAS)},
}
# MixupE, Table 7: test error % on CIFAR-100, PreActResNet-50.
PAPER = {"ERM": 24.68, "Mixup": 23.03, "ERM + R": 22.42, "MixupE": 20.23}
# Name → (builder, epochs here, methods)
MAIN = tuple(METHODS)[:5]
SMALL = {
    "small CNN": (models.small_cnn, 30, {"MNIST 5000": (*MAIN, "MixupE, η = 0"), "MNIST-1D": tuple(METHODS)}),
    "PreActResNet": (models.narrow_preact_resnet, 16, {"digits": MAIN}),
}
LARGE = {
    "PreActResNet-18": models.preact_resnet18, "PreActResNet-34": models.preact_resnet34, "PreActResNet-50": models.preact_resnet50,
    "PreActResNet-101": models.preact_resnet101, "WRN-28-10": models.wide_resnet28_10,
}  # fmt: skip
IMAGENET = {"ResNet-50": models.resnet50}
COLUMNS = ("kind", "data_set", "network", "method", "seed", "epoch", "deformation", "train_loss", "test_loss", "error")


def cells(options: frame.Options) -> list[str]:
    if options.quick:
        return [f"digits | small CNN | {method}" for method in MAIN]
    found = [f"{name} | {network} | {method}" for network, (_, _, places) in SMALL.items()
             for name, methods in places.items() for method in methods]  # fmt: skip
    large = options.pick((), ("PreActResNet-18",), tuple(LARGE))
    places = dict.fromkeys(image_sets.in_folder(options.data), large)
    for name, path in image_streams.in_folder(options.data).items():
        places[name] = large if image_streams.is_tiny(path) else tuple(IMAGENET)
    return found + [
        f"{name} | {network} | {method}" for name, networks in places.items() for network in networks for method in MAIN
    ]


def make_batch(kind: str, alpha: float, generator: torch.Generator):
    """(x, labels) → (x, target) of a kind of training."""
    if kind == "erm":
        return lambda x, labels: (x, labels)
    if kind == "erm_r":
        return regularized_erm(alpha)
    if kind == "mixup":
        return mk.Mixup(alpha, generator=generator)
    return mk.MixupE(alpha, clean_fraction=1 / 4 if kind == "recipe" else 1.0, generator=generator)


@torch.no_grad()
def judge(model: torch.nn.Module, shown: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """(loss, error in percent) in evaluation, of batches of (x, labels)."""
    model.eval()
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for x, labels in shown:
        logits = model(x)
        wrong = (logits.argmax(1) != labels).sum()
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), wrong]).double()
        count += len(labels)
    loss, wrong = (sums / count).tolist()
    return loss, 100 * wrong


def train(
    cell: str,
    images: image_sets.Images | image_streams.Stream,
    seed: int,
    epochs: int,
    model: torch.nn.Module,
    batch: int,
) -> list[frame.Row]:
    name, network, method = cell.split(" | ")
    kind, eta, gamma, batched, apart = METHODS[method]
    generator, order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    mixer, criterion = make_batch(kind, images.alpha, generator), mk.MixupELoss(eta, clean_weight=gamma)
    if apart:
        mk.split_batch_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, fused=True)
    where, rows = {"data_set": name, "network": network, "method": method, "seed": seed}, []
    for epoch in range(epochs):
        drops = (2 * epoch >= epochs) + (4 * epoch >= 3 * epochs)
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1**drops
        model.train()
        for x, labels in images.batches(batch, order):
            x, target = mixer(x, labels)
            optimizer.zero_grad(set_to_none=True)
            mixed = target if isinstance(target, mk.MixedTarget) else None
            criterion(mk.forward_mixupe(model, x, mixed, batched=batched), target).backward()
            optimizer.step()
        if not epoch % 5 or epoch + 1 == epochs:
            train_loss, _ = judge(model, images.shown("train"))
            test_loss, error = judge(model, images.shown("test"))
            kind = "end" if epoch + 1 == epochs else "curve"
            rows.append(
                {
                    "kind": kind,
                    **where,
                    "epoch": epoch + 1,
                    "train_loss": train_loss,
                    "test_loss": test_loss,
                    "error": error,
                }
            )
    if images.height > 8:  # signals are not deformed, and 8 pixels are too few
        for deformation in image_sets.DEFORMATIONS:
            draws = torch.Generator().manual_seed(0)
            moved = ((image_sets.deformed(x, deformation, draws), labels) for x, labels in images.shown("test"))
            loss, error = judge(model, moved)
            rows.append(
                {
                    "kind": "deformed",
                    **where,
                    "epoch": epochs,
                    "deformation": deformation,
                    "test_loss": loss,
                    "error": error,
                }
            )
    return [{name: row.get(name, "") for name in COLUMNS} for row in rows]


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    name, network, _ = cell.split(" | ")
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        if name in image_sets.SMALL:
            build, epochs, _ = SMALL[network]
            images, batch = image_sets.small(name, seed), 128
            model = build(images.classes, flat=images.height == 1).to(memory_format=torch.channels_last)
        else:
            streams = image_streams.in_folder(options.data)
            images = (
                image_streams.read(streams[name], options)
                if name in streams
                else image_sets.from_folder(options.data, name)
            )
            epochs, batch = (options.pick(1, 15, 100), 256) if network in IMAGENET else (options.pick(1, 15, 200), 100)
            model = (LARGE | IMAGENET)[network](images.classes)
        rows += train(cell, images, seed, options.pick(1, epochs), model, batch)
    return rows


def table(rows: list[frame.Row]) -> frame.Lines:
    lines, ends = [], frame.select(rows, kind="end")
    for name, network in dict.fromkeys((row["data_set"], row["network"]) for row in ends):
        own = frame.select(ends, data_set=name, network=network)
        moved = frame.select(rows, kind="deformed", data_set=name, network=network)
        base = frame.column(own, "error", method="Mixup")
        for method in frame.distinct(own, "method"):
            values = frame.column(own, "error", method=method)
            worst = [
                frame.mean_error(frame.column(moved, "error", method=method, deformation=d))[0]
                for d in frame.distinct(moved, "deformation")
            ]
            paper = PAPER.get(method)
            lines.append([
                f"{name}, {network}: {method}", frame.pm(values), "" if method == "Mixup" else frame.difference(values, base),
                frame.pm(frame.column(own, "test_loss", method=method), 3), f"{sum(worst) / len(worst):.1f}" if worst else "–",
                f"{paper:.2f}" if paper else "–", f"{paper - PAPER['Mixup']:+.2f}" if paper else "–",
            ])  # fmt: skip
    return frame.Lines(("", "test error, %", "less Mixup", "test loss", "mean error, deformed", "paper (Table 7)", "paper, less Mixup"), lines,
                       f"Mean ± standard error of {len(frame.distinct(rows, 'seed'))} seeds; the paper's is PreActResNet-50 on CIFAR-100.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(12, 7.2)
    axes, ends = figure.subplots(2, 2), frame.select(rows, kind="end")
    places = list(dict.fromkeys((row["data_set"], row["network"]) for row in ends))
    methods = [method for method in MAIN if frame.select(ends, method=method)]
    name, network = places[0]
    main = [row for row in rows if (row["data_set"], row["network"]) == (name, network)]
    for index, method in enumerate(methods):
        for column, style in (("test_loss", "-"), ("train_loss", ":")):
            curve = [row for row in frame.select(main, method=method) if row["kind"] != "deformed"]
            epochs = frame.distinct(curve, "epoch")
            means = [frame.mean_error(frame.column(curve, column, epoch=epoch))[0] for epoch in epochs]
            axes[0, 0].plot(epochs, means, style, color=f"C{index}", label=method if style == "-" else None)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_title(f"loss, {name}, {network}: test (—), clean training rows (···)")
    axes[0, 0].set_xlabel("epoch")
    axes[0, 0].legend()
    for place, (own_name, own_network) in enumerate(places):
        base = frame.column(ends, "error", data_set=own_name, network=own_network, method="Mixup")
        for index, method in enumerate(methods):
            if method != "Mixup":
                mean, error = frame.paired(
                    frame.column(ends, "error", data_set=own_name, network=own_network, method=method), base
                )
                axes[0, 1].errorbar(
                    place + 0.12 * (index - 2), mean, error, fmt="o", color=f"C{index}", label=None if place else method
                )
    for index, method in enumerate(methods):
        if method in PAPER and method != "Mixup":
            axes[0, 1].plot(len(places) + 0.12 * (index - 2), PAPER[method] - PAPER["Mixup"], "*", color=f"C{index}")
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    axes[0, 1].set_xticks(
        range(len(places) + 1), [*(f"{n}\n{w}" for n, w in places), "the paper's\nCIFAR-100"], fontsize=7
    )
    axes[0, 1].set_title("test error less Mixup's, points")
    axes[0, 1].legend()
    for own_name, own_network in places:
        own = frame.select(ends, data_set=own_name, network=own_network)
        # η → method; every picture has all of them in the same places.
        tried = [(float(m.split("= ")[1]), m) for m in frame.distinct(own, "method") if "η = " in m]
        tried = sorted([*tried, (ETA, "MixupE")]) if tried else []
        if tried:
            base = frame.column(own, "error", method="Mixup")
            means, errors = zip(
                *(frame.paired(frame.column(own, "error", method=m), base) for _, m in tried), strict=True
            )
            places_of = [(0.0, *sorted({ETA, *ETAS})).index(eta) for eta, _ in tried]
            axes[1, 0].errorbar(places_of, means, errors, marker="o", label=f"{own_name}, {own_network}")
            axes[1, 0].set_xticks(range(len(ETAS) + 2), [f"{eta:g}" for eta in (0.0, *sorted({ETA, *ETAS}))])
    axes[1, 0].axhline(0, color="black", linewidth=0.8)
    axes[1, 0].set_title("MixupE (two calls) less Mixup by η, points")
    axes[1, 0].set_xlabel("η")
    if axes[1, 0].containers:
        axes[1, 0].legend()
    moved = frame.select(main, kind="deformed")
    deformations = frame.distinct(moved, "deformation")
    for index, method in enumerate(methods if moved else ()):
        values = [frame.mean_error(frame.column(moved, "error", method=method, deformation=d)) for d in deformations]
        axes[1, 1].errorbar(
            [p + 0.1 * (index - 2) for p in range(len(values))],
            *zip(*values, strict=True),
            fmt="o",
            color=f"C{index}",
            label=method,
        )
    axes[1, 1].set_xticks(range(len(deformations)), deformations, rotation=30, fontsize=7)
    axes[1, 1].set_title(f"test error on deformed images, %, {name}")
