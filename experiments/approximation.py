"""What MixupE approximates (Zou et al., 2023, §2): α_{k,i}, exact q against q̂, and how much of mixup is of first order.

α_{k,i} is the slope of logit k at sample i towards the mean of the inputs, over −f_k(x_i): ∇f_k(x)ᵀ(E[x'] − x) = −α f_k(x). It is 1 for
a ReLU network without biases and inputs of mean 0, and q̂ takes it to be 1 everywhere. The share of the first order is w·mean q
over L_mix − L_std; with λ closer to 1 it must tend to 1.
"""

import torch

import mixupe_kernels as mk

from . import batched, frame, sets

ALPHA = 1.0
METHODS = {"ERM": batched.erm, "Mixup": batched.mixup(ALPHA), "MixupE": batched.mixupe(ALPHA, 1e-3)}
EPOCHS = (0, 1, 5, 25, 100)
QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
SHARES = (0.01, 0.1, 1.0)  # of 1 − λ


def cells(options: frame.Options) -> list[str]:
    return list(METHODS)


def slopes(network, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(f, ∇f(x)ᵀ(x̄ − x)) of every row of one network, (n, C) each; x̄ is the mean of the rows."""
    return torch.func.jvp(network, (x,), (x.mean(0) - x,))


def measure(network, x: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, float]:
    """Figures of one seed's network on clean training rows."""
    logits, slope = slopes(network, x)
    exact = mk.exact_q(network, x, labels, x.mean(0))
    approximate = mk.q_hat(logits, labels)
    ratio = (-slope / logits)[logits.abs() > 0.1 * logits.abs().mean()]
    figures = {
        f"alpha_{int(100 * q)}": v.item() for q, v in zip(QUANTILES, ratio.quantile(QUANTILES.to(ratio)), strict=True)
    }
    figures["correlation"] = torch.corrcoef(torch.stack([exact, approximate]))[0, 1].item()
    figures["same_sign"] = (exact.sign() == approximate.sign()).float().mean().item()
    figures["exact"], figures["approximate"] = exact.mean().item(), approximate.mean().item()
    standard = torch.nn.functional.cross_entropy(logits, labels)
    figures["standard"] = standard.item()
    generator = frame.generator(seed, x.device)
    for share in SHARES:
        # The paper's form of the mixup loss: λ ~ D_λ, and the own label alone (§2.1). 1 − λ is shrunk by the share.
        total, weight, draws = 0.0, 0.0, 40
        for _ in range(draws):
            partner = torch.randint(len(x), (len(x),), generator=generator, device=x.device)
            away = share * (1 - mk.sampling.DLambda(ALPHA).sample((len(x),), generator, x.device))
            total += torch.nn.functional.cross_entropy(network(mk.mix(x, partner, 1 - away)), labels).item() / draws
            weight += away.mean().item() / draws
        figures[f"difference_{share:g}"] = total - standard.item()
        figures[f"first_order_{share:g}"] = weight * figures["exact"]
    return figures


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    table = sets.digits_table(options)
    parts = sets.stacked(table, options, rows=1000)
    networks = sets.networks(parts)
    epochs, rows = (0, options.epochs) if options.epochs else options.pick((0, 2), EPOCHS), []

    def look(epoch):
        for seed in range(options.seeds):
            own = [parameter[seed].detach() for parameter in networks.parameters]

            def network(x, own=own):
                for index in range(len(own) // 2):
                    x = (x.relu() if index else x) @ own[2 * index] + own[2 * index + 1]
                return x

            figures = measure(network, parts.x_train[seed], parts.train[seed], seed)
            rows.append({"data_set": table.name, "method": cell, "epoch": epoch, "seed": seed, **figures})

    look(0)
    training = batched.train(networks, parts.x_train, parts.train, METHODS[cell], epochs[-1])
    for epoch, _ in enumerate(training, 1):
        if epoch in epochs:
            look(epoch)
    return rows


def ratios(rows: list[frame.Row], share: float, **where) -> list[float]:
    """The first order over the whole difference, of each seed."""
    return [row[f"first_order_{share:g}"] / row[f"difference_{share:g}"] for row in frame.select(rows, **where)]


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    for method in frame.distinct(rows, "method"):
        for epoch in frame.distinct(rows, "epoch"):
            where = {"method": method, "epoch": epoch}
            low, middle, high = (frame.mean_error(frame.column(rows, f"alpha_{q}", **where))[0] for q in (5, 50, 95))
            lines.append([
                f"{method}, epoch {epoch}", f"{middle:.2f} ({low:.2f} … {high:.2f})", "1",
                *(frame.pm(frame.column(rows, name, **where)) for name in ("exact", "approximate", "correlation", "same_sign")),
                *(frame.pm(ratios(rows, share, **where)) if epoch else "–" for share in (0.01, 1.0)),
            ])  # fmt: skip
    return frame.Lines(
        ("", "α: median (5 … 95 %)", "paper's", "mean q", "mean q̂", "correlation", "same sign", "1st order, (1 − λ)/100", "1st order"),
        lines, "The first order's share of L_mix − L_std: 1 if mixing were infinitesimal; before training both are 0 but for chance.",
    )  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(12, 3.6)
    first, second, third = figure.subplots(1, 3)
    epochs = frame.distinct(rows, "epoch")
    places = range(len(epochs))
    for index, method in enumerate(frame.distinct(rows, "method")):
        middle = [frame.mean_error(frame.column(rows, "alpha_50", method=method, epoch=e))[0] for e in epochs]
        low, high = (
            [frame.mean_error(frame.column(rows, f"alpha_{q}", method=method, epoch=e))[0] for e in epochs]
            for q in (5, 95)
        )
        shifted = [place + 0.12 * (index - 1) for place in places]
        spread = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
        first.errorbar(shifted, middle, spread, fmt="o", markersize=3, label=method)
        for share, style in ((1.0, "-"), (0.01, ":")):
            values = [frame.mean_error(ratios(rows, share, method=method, epoch=e)) for e in epochs[1:]]
            label = method if share == 1.0 else None
            third.errorbar(shifted[1:], *zip(*values, strict=True), fmt=style, color=f"C{index}", label=label)
        for name, style in (("exact", "-"), ("approximate", "--")):
            means, errors = zip(
                *(frame.mean_error(frame.column(rows, name, method=method, epoch=e)) for e in epochs), strict=True
            )
            second.errorbar(
                shifted, means, errors, fmt=style, color=f"C{index}", label=f"{method}, {'q' if style == '-' else 'q̂'}"
            )
    first.axhline(1, color="black", linewidth=0.8)
    first.set_title("α, median and 5 to 95 %; q̂ takes it to be 1")
    second.set_title("mean q (—) and q̂ (– –)")
    third.set_title("first order over L_mix − L_std\n— λ uniform; ··· 1 − λ a hundredth of that")
    third.axhline(1, color="black", linewidth=0.8)
    third.set_ylim(0, 1.4)
    for axis in (first, second, third):
        axis.set_xticks(places, epochs)
        axis.set_xlabel("epoch")
        axis.legend(fontsize=7)
