"""The law of λ, learned (after MetaMixup; Carratino's slides): α follows the validation loss after one step of training.

Every few steps the network takes a trial step on mixed rows, λ ~ Beta(α, α) drawn differentiably in α, and the gradient in log α of the loss
of validation rows after that step moves α. The network itself trains on training rows alone, and is judged on test rows. Fixed α
stand beside it; the best of them by validation loss is what a grid search finds, at as many trainings. Validation labels are right, also where
training labels are drawn at random.
"""

import numpy as np
import torch

import mixupe_kernels as mk

from . import batched, frame, sets

FIXED = (0.1, 0.4, 1.0, 4.0)
CASES = {"clean": 0.0, "30 % random labels": 0.3}
START, META_RATE, EVERY, ROWS = 1.0, 0.03, 4, 1000
TRIAL_RATE = 0.5
COLUMNS = ("kind", "case", "method", "seed", "epoch", "alpha", "error", "validation")


def _row(**values) -> frame.Row:
    return {name: values.get(name, "") for name in COLUMNS}


def cells(options: frame.Options) -> list[str]:
    methods = ["ERM", *(f"α = {alpha:g}" for alpha in FIXED), "learned"]
    return [f"{case}: {method}" for case in CASES for method in methods]


class Learned:
    """An objective whose α, one a seed, moves by the meta gradient: called as every other objective."""

    def __init__(self, seeds: int, x_validation: torch.Tensor, validation: torch.Tensor):
        self.log_alpha = torch.full((seeds,), float(np.log(START)), device=validation.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_alpha], META_RATE)
        self.x, self.labels, self.calls = x_validation, validation, 0

    def gradient(
        self, network, x, labels, draws, lam: torch.Tensor, source: torch.Tensor, rows: int | None = None
    ) -> torch.Tensor:
        """That of the loss of ``rows`` validation rows after one step on rows mixed with λ (E,), in ``source``, from which λ was made."""
        share = lam[:, None].expand(labels.shape)
        partner = draws.partners(labels.shape[1])
        targets = batched.Rows(labels, labels.gather(1, partner), share)
        loss = batched.cross_entropy(network(batched.mix(x, partner, share)), targets)[0].mean(1).sum()
        gradients = torch.autograd.grad(loss, network.parameters, create_graph=True)
        moved = [p.detach() - TRIAL_RATE * g for p, g in zip(network.parameters, gradients, strict=True)]
        held = torch.stack([torch.randperm(len(own), device=own.device)[:rows] for own in self.labels])
        out = network(batched.gather(self.x, held), parameters=moved)
        after = batched.cross_entropy(out, batched.plain(self.labels.gather(1, held)))[0].mean(1).sum()
        return torch.autograd.grad(after, source)[0]

    def meta_step(self, network, x, labels, draws) -> None:
        """One step of log α. ``rsample`` takes no generator, so that these λ and validation rows come from torch's own."""
        alpha = self.log_alpha.exp()
        lam = torch.distributions.Beta(alpha, alpha, validate_args=False).rsample()
        self.log_alpha.grad = self.gradient(network, x, labels, draws, lam, self.log_alpha, labels.shape[1])
        self.optimizer.step()
        # Laws of λ take numbers: once a meta step the host waits for these, as it does for what is logged.
        self.laws = [mk.sampling.Beta(alpha) for alpha in self.log_alpha.detach().exp().tolist()]

    def __call__(self, network, x, labels, draws) -> torch.Tensor:
        if self.calls % EVERY == 0:
            self.meta_step(network, x, labels, draws)
        self.calls += 1
        each = zip(self.laws, draws.generators, strict=True)
        lam = torch.stack([law.sample((), generator, labels.device) for law, generator in each])
        lam, partner = lam[:, None].expand(labels.shape), draws.partners(labels.shape[1])
        rows = batched.Rows(labels, labels.gather(1, partner), lam)
        return batched.cross_entropy(network(batched.mix(x, partner, lam)), rows)[0].mean(1)


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    case, method = cell.split(": ")
    parts = sets.stacked(sets.digits_table(options), options, rows=ROWS, corrupted=CASES[case])
    network = sets.networks(parts)
    learned, rows = None, []
    objective = batched.erm
    if method == "learned":
        torch.manual_seed(0)
        objective = learned = Learned(options.seeds, parts.x_validation, parts.validation)
    elif method != "ERM":
        objective = batched.mixup(float(method.removeprefix("α = ")))
    for epoch, _ in enumerate(
        batched.train(network, parts.x_train, parts.train, objective, options.length(2, 60, 200)), 1
    ):
        if learned:
            rows += [_row(kind="path", case=case, method=method, seed=seed, epoch=epoch, alpha=alpha)
                     for seed, alpha in enumerate(learned.log_alpha.detach().exp().tolist())]  # fmt: skip
    figures = zip(batched.errors(network, parts.x_test, parts.test),
                  batched.losses(network, parts.x_validation, parts.validation), strict=True)  # fmt: skip
    return rows + [
        _row(kind="end", case=case, method=method, seed=seed, error=error.item(), validation=loss.item())
        for seed, (error, loss) in enumerate(figures)
    ]


def searched(rows: list[frame.Row], case: str) -> list[float]:
    """The test error of each seed's fixed α whose validation loss is least."""
    ends = [row for row in frame.select(rows, kind="end", case=case) if str(row["method"]).startswith("α")]
    return [
        min(frame.select(ends, seed=seed), key=lambda row: row["validation"])["error"]
        for seed in sorted(frame.distinct(ends, "seed"))
    ]


def table(rows: list[frame.Row]) -> frame.Lines:
    lines = []
    for case in frame.distinct(rows, "case"):
        ends = frame.select(rows, kind="end", case=case)
        learned = frame.column(ends, "error", method="learned")
        paths = frame.select(rows, kind="path", case=case)
        last = frame.column(paths, "alpha", epoch=max(row["epoch"] for row in paths))
        for method in frame.distinct(ends, "method"):
            values = frame.column(ends, "error", method=method)
            less = "" if method == "learned" else frame.difference(learned, values)
            lines.append([f"{case}: {method}", frame.pm(values), less, frame.pm(frame.column(ends, "validation", method=method), 3),
                          frame.pm(last) if method == "learned" else ""])  # fmt: skip
        values = searched(rows, case)
        lines.append([f"{case}: grid search", frame.pm(values), frame.difference(learned, values), "", ""])
    return frame.Lines(("", "test error, %", "learned less this", "validation loss", "α at the end"), lines,
                       "The slides propose it and give no figure.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(10, 3.6)
    left, right = figure.subplots(1, 2)
    cases = frame.distinct(rows, "case")
    for index, case in enumerate(cases):
        paths = frame.select(rows, kind="path", case=case)
        epochs = frame.distinct(paths, "epoch")
        for seed in frame.distinct(paths, "seed"):
            left.semilogy(epochs, frame.column(paths, "alpha", seed=seed), color=f"C{index}", linewidth=0.6)
        left.plot([], [], color=f"C{index}", label=f"{case}, each seed")
    left.set_xlabel("epoch")
    left.set_ylabel("learned α")
    left.legend()
    methods = frame.distinct(frame.select(rows, kind="end"), "method")
    for index, case in enumerate(cases):
        values = [frame.column(rows, "error", kind="end", case=case, method=method) for method in methods] + [
            searched(rows, case)
        ]
        means, errors = zip(*map(frame.mean_error, values), strict=True)
        right.errorbar([place + 0.1 * index for place in range(len(means))], means, errors, fmt="o", label=case)
    right.set_xticks(range(len(methods) + 1), [*methods, "grid\nsearch"])
    right.set_ylabel("test error, %")
    right.set_ylim(bottom=0)
    right.legend()
