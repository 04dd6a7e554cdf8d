"""What ``python -m experiments quality images`` trains: methods, networks, cells, and the records that a run leaves."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from bench import models
from bench.methods import POLICIES, Policy

ALPHAS, SEEDS = (1.0, 0.2), 8
ETA = 1e-3


class Method(NamedTuple):
    """``name`` is erm, mixup, update_bn, or how BatchNorm meets the two kinds of rows: two calls, joint, split."""

    name: str
    fraction: float = 0.0
    gamma: float = 0.0
    eta: float = 0.0

    @property
    def policy(self) -> Policy:
        if not self.fraction:
            return POLICIES["erm" if self.name == "erm" else "mixup"]
        form = {"apart": self.name == "split", "batched": self.name != "two calls"}
        return Policy(self.name, {"clean_fraction": self.fraction}, clean_weight=self.gamma, **form)


ERM, MIXUP, UPDATE_BN = Method("erm"), Method("mixup"), Method("update_bn")
AUTHORS = Method("two calls", 1.0, 0.0, ETA)
RECIPE = Method("split", 1 / 4, 1 / 4, ETA)
# Plain Mixup is trained once, and gives the row of UPDATE_BN too.
KEY = (
    MIXUP, ERM, AUTHORS, RECIPE, Method("split", 1 / 4, 1.0, ETA), Method("joint", 1 / 8, 0.0, ETA),
    Method("joint", 1.0, 1.0, 0.0), Method("joint", 1 / 4, 1 / 4, ETA),
)  # fmt: skip
ETAS = (0.0, ETA, 0.1, 1.0)
FORMS = ("split", "joint")


def grid() -> list[Method]:
    """At 1/4 every form, γ and η; at 1/8 every form and γ; the authors' form at every η."""
    quarter = itertools.product(FORMS, [1 / 4], (1 / 4, 1.0, 0.0), ETAS)
    eighth = itertools.product(FORMS, [1 / 8], (1 / 8, 1.0, 0.0), [ETA])
    return [Method(*point) for point in (*quarter, *eighth)] + [AUTHORS._replace(eta=eta) for eta in ETAS]


class Network(NamedTuple):
    """``timed`` methods are trained at equal time too."""

    build: Callable[..., nn.Sequential]
    epochs: int
    methods: tuple[Method, ...]
    timed: tuple[Method, ...]


NETWORKS = {
    "small CNN": Network(models.small_cnn, 30, KEY, KEY[1:]),
    "PreActResNet": Network(models.narrow_preact_resnet, 16, KEY[:-1], (ERM, AUTHORS, RECIPE)),
}
GRID = ("small CNN", 1.0)


class Cell(NamedTuple):
    """What is trained once for each seed. ERM has α = 0."""

    data_set: str
    network: str
    alpha: float
    method: Method
    epochs: int


@dataclasses.dataclass
class Cost:
    """CPU time of a step over that of Mixup's, median and quartiles of paired ratios; of ``update_bn`` a pass over a batch."""

    data_set: str
    network: str
    method: str
    fraction: float
    median: float
    low: float
    high: float


@dataclasses.dataclass
class Run:
    """One trained network. Errors and ``ece`` in percent; ``scaled_nll`` with the temperature of the validation rows.

    ``first_variance`` is the running variance of the first BatchNorm over the variance that clean training rows have there.
    """

    data_set: str
    network: str
    alpha: float
    method: str
    fraction: float
    gamma: float
    eta: float
    epochs: int
    seed: int
    validation_error: float
    validation_nll: float
    test_error: float
    nll: float
    ece: float
    temperature: float
    scaled_nll: float
    q_hat: float
    first_variance: float
    seconds: float


def cost_of(costs: list[Cost], data_set: str, network: str, method: Method) -> float:
    """A method's step over Mixup's; ``update_bn`` adds one pass over the training rows to a whole training."""
    form = (data_set, network, method.name, method.fraction)
    (cost,) = [cost.median for cost in costs if (cost.data_set, cost.network, cost.method, cost.fraction) == form]
    return 1 + cost / NETWORKS[network].epochs if method == UPDATE_BN else cost


def epochs_at_equal_time(epochs: int, cost: float) -> int:
    return max(1, round(epochs / cost))


def alpha_of(alpha: float, method: Method) -> float:
    return 0.0 if method == ERM else alpha


def plan(costs: list[Cost], data_sets: list[str], networks: list[str], epochs: int | None = None) -> list[Cell]:
    """Every cell, what the bars are about first, none twice."""
    cells = []
    for name in networks:
        network = NETWORKS[name]
        full = epochs or network.epochs
        for alpha, data_set in itertools.product(ALPHAS, data_sets):
            for method in network.methods:
                cells.append(Cell(data_set, name, alpha_of(alpha, method), method, full))
            for method in network.timed:
                timed = epochs_at_equal_time(full, cost_of(costs, data_set, name, method))
                cells.append(Cell(data_set, name, alpha_of(alpha, method), method, timed))
    name, alpha = GRID
    if name in networks:
        full = epochs or NETWORKS[name].epochs
        for data_set in data_sets:
            cells += [Cell(data_set, name, alpha, method, full) for method in grid()]
    return list(dict.fromkeys(cells))


def key_of(run: Run) -> tuple[Cell, int]:
    method = Method(run.method, run.fraction, run.gamma, run.eta)
    return Cell(run.data_set, run.network, run.alpha, method, run.epochs), run.seed
