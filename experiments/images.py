"""Networks with BatchNorm (MixupE §4.1, 4.5): errors, loss curves (Fig. 1), ERM + R (Table 7), η, deformed test images (Table 8).

SGD at 0.1, momentum 0.9, weight decay 1e-4, a tenth of the rate from a half and a hundredth from three quarters of the epochs on, α = 1,
and 0.2 on Tiny-ImageNet and ImageNet. Here a small CNN and a narrow PreActResNet on small grey sets; with ``--data`` CIFAR, SVHN and
Tiny-ImageNet by PreActResNet-18, and with ``--full`` by the paper's five networks for its 200 epochs. ImageNet's folders (train/CLASS,
val/CLASS) are read as they are trained on, by ResNet-50, and with ``--full`` by ViT-B/16 and timm's CoAtNet-0 too, which have AdamW,
α = 0.4 and η = 5e-4 as in the paper; in batches of 256 for 100 epochs, where the paper has 100 000 of 4096. MixupE is the authors' two
calls on the whole batch.
``python -m experiments quality images`` compares every use of the clean rows, at equal time too.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import mixupe_kernels as mk
from bench import models
from bench.methods import regularized_erm

from . import frame, image_sets, image_streams

ETA = 1e-3
ETAS = (1e-4, 1e-2, 0.1, 1.0)
# name → (kind of batch, η or None for the network's, γ, one call of the model, BatchNorm apart)
METHODS: dict[str, tuple[str, float | None, float, bool, bool]] = {
    "ERM": ("erm", 0.0, 0.0, True, False),
    "Mixup": ("mixup", 0.0, 0.0, True, False),
    "ERM + R": ("erm_r", None, 0.0, True, False),
    "MixupE": ("mixupe", None, 0.0, False, False),
    "MixupE 1/4, γ = 1/4": ("recipe", None, 1 / 4, True, True),
    **{f"MixupE, η = {eta:g}": ("mixupe", eta, 0.0, False, False) for eta in (0.0, *ETAS)},
}
# MixupE, Table 7: test error % on CIFAR-100, PreActResNet-50; it stands beside the small sets too.
PAPER = {"ERM": 24.68, "Mixup": 23.03, "ERM + R": 22.42, "MixupE": 20.23}
# MixupE, Tables 1 (CIFAR-100) and 3 (ImageNet, 100 less top-1): test error % of ERM, Mixup and MixupE.
OTHERS = {
    "PreActResNet-101": (23.20, 23.05, 18.86), "WRN-28-10": (22.20, 19.38, 17.12),
    "ResNet-50": (23.8, 22.8, 22.3), "ViT-B/16": (20.9, 20.3, 19.6), "CoAtNet-0": (20.2, 19.2, 18.4),
}  # fmt: skip
MAIN = tuple(METHODS)[:5]
PLACES = {
    "small CNN": {"MNIST 5000": (*MAIN, "MixupE, η = 0"), "MNIST-1D": tuple(METHODS)},
    "PreActResNet": {"digits": MAIN},
}


def sgd(model: torch.nn.Module, batch: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, fused=True)


def steps_down(share: float) -> float:
    """The rate's factor when that share of the epochs is over."""
    return 0.1 ** ((share >= 0.5) + (share >= 0.75))


def adamw(model: torch.nn.Module, batch: int) -> torch.optim.Optimizer:
    """The paper names AdamW alone; its numbers are those with which ViTs are usually trained (Touvron et al., 2021)."""
    return torch.optim.AdamW(model.parameters(), 5e-4 * batch / 512, weight_decay=0.05, fused=True)


def cosine(share: float) -> float:
    """Up in the first twentieth, then half a cosine down."""
    return share / 0.05 + 0.01 if share < 0.05 else 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))


def coatnet0(classes: int) -> torch.nn.Module:
    """CoAtNet-0 (Dai et al., 2021) for 224×224 images, as timm has it."""
    try:
        import timm
    except ModuleNotFoundError:
        raise ModuleNotFoundError("CoAtNet-0 is timm's: pip install timm, or run the others by --only") from None
    return timm.create_model("coatnet_0_224", num_classes=classes)


class Training(NamedTuple):
    """A network, how it is built from the number of classes, and how it is trained. ``alpha``: that of the set if None."""

    build: Callable[..., torch.nn.Module]
    epochs: tuple[int, int]  # here, and by ``--full``
    batch: int
    optimizer: Callable[[torch.nn.Module, int], torch.optim.Optimizer] = sgd
    rate: Callable[[float], float] = steps_down
    eta: float = ETA
    alpha: float | None = None


LARGE = {
    name: Training(build, (15, 200), 100)
    for name, build in {
        "PreActResNet-18": models.preact_resnet18, "PreActResNet-34": models.preact_resnet34,
        "PreActResNet-50": models.preact_resnet50, "PreActResNet-101": models.preact_resnet101,
        "WRN-28-10": models.wide_resnet28_10,
    }.items()
}  # fmt: skip
SMALL = {
    "small CNN": Training(models.small_cnn, (30, 30), 128),
    "PreActResNet": Training(models.narrow_preact_resnet, (16, 16), 128),
}
IMAGENET = {
    "ResNet-50": Training(models.resnet50, (15, 100), 256),
    "ViT-B/16": Training(models.vit_b16, (15, 100), 256, adamw, cosine, 5e-4, 0.4),
    "CoAtNet-0": Training(coatnet0, (15, 100), 256, adamw, cosine, 5e-4, 0.4),
}
COLUMNS = ("kind", "data_set", "network", "method", "seed", "epoch", "deformation", "train_loss", "test_loss", "error")


def cells(options: frame.Options) -> list[str]:
    if options.quick:
        return [f"digits | small CNN | {method}" for method in MAIN]
    found = [f"{name} | {network} | {method}" for network, places in PLACES.items()
             for name, methods in places.items() for method in methods]  # fmt: skip
    large, imagenet = (tuple(networks) if options.full else tuple(networks)[:1] for networks in (LARGE, IMAGENET))
    places = dict.fromkeys(image_sets.in_folder(options.data), large)
    for name, path in image_streams.in_folder(options.data).items():
        places[name] = large if image_streams.is_tiny(path) else imagenet
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
    sums, count = [], 0
    for x, labels in shown:
        logits = model(x)
        wrong = (logits.argmax(1) != labels).sum()
        sums.append(torch.stack([F.cross_entropy(logits, labels, reduction="sum"), wrong]).double())
        count += len(labels)
    loss, wrong = (torch.stack(sums).sum(0) / count).tolist()
    return loss, 100 * wrong


def train(
    cell: str,
    images: image_sets.Images | image_streams.Stream,
    seed: int,
    epochs: int,
    model: torch.nn.Module,
    how: Training,
    device: torch.device,
) -> list[frame.Row]:
    name, network, method = cell.split(" | ")
    kind, eta, gamma, batched, apart = METHODS[method]
    mixer = make_batch(kind, how.alpha or images.alpha, frame.generator(seed, device))
    criterion = mk.MixupELoss(how.eta if eta is None else eta, clean_weight=gamma)
    if apart:
        mk.split_batch_norm(model)
    optimizer, order = how.optimizer(model, how.batch), frame.generator(seed, images.order_device)
    first_rate = optimizer.param_groups[0]["lr"]
    where, rows = {"data_set": name, "network": network, "method": method, "seed": seed}, []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = first_rate * how.rate(epoch / epochs)
        model.train()
        for x, labels in images.batches(how.batch, order):
            optimizer.zero_grad(set_to_none=True)
            x, target = mixer(x, labels)
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
            draws = frame.generator(0, device)
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
        how, streams = (SMALL | LARGE | IMAGENET)[network], image_streams.in_folder(options.data)
        if name in image_sets.SMALL:
            images = image_sets.small(name, seed).to(options.device)
            model = how.build(images.classes, flat=images.height == 1)
        else:
            if name in streams:
                images = image_streams.read(streams[name], options)
            else:
                images = image_sets.from_folder(options.data, name).to(options.device)
            model = how.build(images.classes)
        model.to(options.device, memory_format=torch.channels_last)
        rows += train(cell, images, seed, options.length(1, *how.epochs), model, how, options.device)
    return rows


def paper_of(name: str, network: str) -> dict[str, float]:
    """The paper's test error of each method, if it has that set and network, or if the set is a small one."""
    if name in image_sets.SMALL or (name, network) == ("cifar-100-python", "PreActResNet-50"):
        return PAPER
    known = network in OTHERS and (network in IMAGENET or name == "cifar-100-python")
    return dict(zip(("ERM", "Mixup", "MixupE"), OTHERS[network], strict=True)) if known else {}


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
            of_paper = paper_of(name, network)
            paper = of_paper.get(method)
            lines.append([
                f"{name}, {network}: {method}", frame.pm(values), "" if method == "Mixup" else frame.difference(values, base),
                frame.pm(frame.column(own, "test_loss", method=method), 3), f"{sum(worst) / len(worst):.1f}" if worst else "–",
                f"{paper:.2f}" if paper else "–", f"{paper - of_paper['Mixup']:+.2f}" if paper else "–",
            ])  # fmt: skip
    return frame.Lines(("", "test error, %", "less Mixup", "test loss", "mean error, deformed", "paper", "paper, less Mixup"), lines,
                       f"Mean ± standard error of {len(frame.distinct(rows, 'seed'))} seeds; the paper's beside a small set is PreActResNet-50 on CIFAR-100.")  # fmt: skip


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
    if moved:
        axes[1, 1].legend(fontsize=7)
    axes[1, 1].set_title(f"test error on deformed images, %, {name}")
