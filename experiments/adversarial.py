"""Adversarial inputs (mixup §3.5): FGSM and I-FGSM, by the network's own gradients and by those of another one.

Inputs move by ε of each feature's range along the gradient's sign, at once or in ten steps. White box: the gradients are the network's
own. Black box: those of an ERM network of the same training rows and another initialisation. ε = 4/255 is the paper's; the digits'
17 grey levels make that a quarter of one level, so 32/255 stands beside it.
"""

import torch

from . import batched, frame, sets

METHODS = {
    "ERM": batched.erm,
    "Mixup": batched.mixup(1.0),
    "MixupE": batched.mixupe(1.0, 1e-3),
    "MixupE, η = 1": batched.mixupe(1.0, 1.0),
    "Mixup, α = 8": batched.mixup(8.0),
}
STEPS = {"4/255": 4 / 255, "32/255": 32 / 255}
ITERATIONS = {"FGSM": 1, "I-FGSM": 10}
BOXES = ("white", "black")
# mixup, Table 3: top-1 error on ImageNet, ResNet-101, ε = 4 of 255, ten iterations; compared with the text of arXiv 1710.09412v2.
PAPER = {("white", "FGSM"): {"ERM": 90.7, "Mixup": 75.2}, ("white", "I-FGSM"): {"ERM": 99.9, "Mixup": 99.6},
         ("black", "FGSM"): {"ERM": 57.0, "Mixup": 46.0}, ("black", "I-FGSM"): {"ERM": 57.3, "Mixup": 40.9}}  # fmt: skip


def cells(options: frame.Options) -> list[str]:
    return list(METHODS)


def attack(
    source: batched.Networks, x: torch.Tensor, labels: torch.Tensor, step: torch.Tensor, times: int
) -> torch.Tensor:
    """x (E, n, d) moved ``times`` times by step/times (E, 1, d) along the sign of the source's gradient."""
    moved = x
    for _ in range(times):
        moved = moved.detach().requires_grad_()
        loss = batched.cross_entropy(source(moved), batched.plain(labels))[0].sum()
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() + step / times * gradient.sign()
    return moved


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    table = sets.digits_table(options)
    parts = sets.stacked(table, options, rows=1000)
    network, epochs = sets.networks(parts), options.length(3, 100, 200)
    batched.trained(network, parts.x_train, parts.train, METHODS[cell], epochs)
    other = sets.networks(parts, first_seed=1000)
    batched.trained(other, parts.x_train, parts.train, batched.erm, epochs)
    reach = parts.x_train.amax(1, keepdim=True) - parts.x_train.amin(1, keepdim=True)
    found = {("none", "none", "0"): parts.x_test}
    for box, source in zip(BOXES, (network, other), strict=True):
        for name, times in ITERATIONS.items():
            for size, step in STEPS.items():
                found[box, name, size] = attack(source, parts.x_test, parts.test, step * reach, times)
    return [
        {"data_set": table.name, "method": cell, "box": box, "attack": name, "step": size, "seed": seed, "error": error}
        for (box, name, size), x in found.items()
        for seed, error in enumerate(batched.errors(network, x, parts.test).tolist())
    ]


def table(rows: list[frame.Row]) -> frame.Lines:
    methods, lines = frame.distinct(rows, "method"), []
    for box, attack_name, step in dict.fromkeys((row["box"], row["attack"], row["step"]) for row in rows):
        where = {"box": box, "attack": attack_name, "step": step}
        paper = PAPER.get((box, attack_name)) if step == "4/255" else None
        lines.append([
            f"{box} box, {attack_name}, {step}" if box != "none" else "clean",
            *(frame.pm(frame.column(rows, "error", method=method, **where), 1) for method in methods),
            f"{paper['ERM']} → {paper['Mixup']}" if paper else "–",
        ])  # fmt: skip
    return frame.Lines(("test error, %", *methods, "paper, ERM → Mixup"), lines,
                       f"{frame.distinct(rows, 'data_set')[0]}, 1000 training rows at most. The paper's are mixup's Table 3 (arXiv 1710.09412v2): top-1 on ImageNet.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(10, 3.6)
    methods = frame.distinct(rows, "method")
    places = [(box, name) for box in BOXES for name in ITERATIONS]
    for axis, step in zip(figure.subplots(1, 2), STEPS, strict=True):
        for index, method in enumerate(methods):
            values = [frame.column(rows, "error", method=method, box="none")]
            values += [
                frame.column(rows, "error", method=method, box=box, attack=name, step=step) for box, name in places
            ]
            means, errors = zip(*map(frame.mean_error, values), strict=True)
            shift = (index - (len(methods) - 1) / 2) * 0.16
            axis.bar([place + shift for place in range(5)], means, 0.16, yerr=errors, label=method)
        axis.set_xticks(range(5), ["clean", *(f"{box} box\n{name}" for box, name in places)])
        axis.set_title(f"ε = {step} of each feature's range")
        axis.set_ylabel("test error, %")
    figure.axes[0].legend()
