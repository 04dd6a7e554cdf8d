"""Tabular sets (MixupE §4.2, Table 4): ERM, Mixup and MixupE, (α, η) chosen on validation rows, and every η unchosen.

The paper's protocol: two hidden layers of 128, Adam at 1e-3, 25 epochs, batches of 100, one-hot categories, imputed and standardised.
Each seed has its own stratified split: 60 % to train, 20 % to choose by, 20 % to test. ``--full`` takes the paper's whole grid; the
grid here is a part of it. Folders of ARFF and CSV files given by ``--data`` join scikit-learn's sets.
"""

import itertools

from . import data, ensemble, frame
from .quality import tabular as quality

POLICIES = {"erm": "ERM", "mixup": "Mixup", "full": "MixupE"}
ALPHAS, ETAS = (0.02, 0.2, 2.0), (1e-3, 0.1, 1.0)
EPOCHS = 25
# MixupE, Table 4: test error % of ERM, Mixup and MixupE.
PAPER = {
    "arrhythmia": (34.60, 35.49, 34.85), "letter": (4.56, 3.71, 4.04), "balance-scale": (3.87, 3.70, 3.68),
    "mfeat-factors": (2.74, 2.44, 2.56), "mfeat-fourier": (17.69, 17.80, 17.57), "mfeat-karhunen": (3.74, 3.06, 2.47),
    "mfeat-morphological": (25.00, 24.62, 24.66), "mfeat-zernike": (17.58, 15.19, 15.55), "cmc": (45.77, 46.67, 45.42),
    "optdigits": (1.48, 1.15, 1.33), "pendigits": (1.03, 0.76, 0.72), "iris": (9.06, 8.14, 7.29),
    "mnist_784": (2.83, 2.57, 2.56), "abalone": (35.05, 35.07, 34.91), "volkert": (33.26, 32.74, 32.54),
}  # fmt: skip


def tables(options: frame.Options) -> list[data.Table]:
    if options.quick:
        return [data.bundled("iris")]
    found = [data.bundled(name) for name in data.BUNDLED] + (data.folder(options.data) if options.data else [])
    return sorted(found, key=lambda table: len(table.labels))


def cells(options: frame.Options) -> list[str]:
    return [f"{table.name}: {policy}" for table in tables(options) for policy in POLICIES]


def members(policy: str, options: frame.Options) -> list[ensemble.Member]:
    """Every seed at every grid point that the policy depends on."""
    alphas, etas = options.pick(((0.2,), (1e-3, 1.0)), (ALPHAS, ETAS), quality.GRIDS["paper"])
    if policy == "erm":
        alphas = (1.0,)
    if policy != "full":
        etas = (0.0,)
    return [ensemble.Member(*point) for point in itertools.product(range(options.seeds), alphas, etas)]


def run(cell: str, options: frame.Options) -> list[frame.Row]:
    name, policy = cell.split(": ")
    (table,) = (table for table in tables(options) if table.name == name)
    checkpoints = {quality.EPOCHS: options.length(2, EPOCHS)}
    runs = quality.train_case(table, 0.0, policy, members(policy, options), 1.0, checkpoints, options.device)
    return [
        {"data_set": name, "policy": policy, "seed": run.seed, "alpha": run.alpha, "eta": run.eta,
         "validation": run.validation_error, "error": run.test_error} for run in runs
    ]  # fmt: skip


def chosen(rows: list[frame.Row], name: str, policy: str) -> list[float]:
    """Each seed's test error at the grid point of its least validation error, the first of several."""
    own = frame.select(rows, data_set=name, policy=policy)
    return [
        min(frame.select(own, seed=seed), key=lambda row: row["validation"])["error"]
        for seed in sorted(frame.distinct(own, "seed"))
    ]


def unchosen(rows: list[frame.Row], name: str, eta: float) -> list[float]:
    """Each seed's mean test error over the values of α at one η; 0 is Mixup."""
    own = (
        frame.select(rows, data_set=name, policy="full", eta=eta)
        if eta
        else frame.select(rows, data_set=name, policy="mixup")
    )
    seeds = sorted(frame.distinct(own, "seed"))
    return [frame.mean_error(frame.column(own, "error", seed=seed))[0] for seed in seeds]


def table(rows: list[frame.Row]) -> frame.Lines:
    etas, lines = [eta for eta in frame.distinct(rows, "eta") if eta], []
    for name in frame.distinct(rows, "data_set"):
        mixup, paper = chosen(rows, name, "mixup"), PAPER.get(name)
        lines.append([
            name, *(frame.pm(chosen(rows, name, policy)) for policy in POLICIES),
            frame.difference(chosen(rows, name, "full"), mixup),
            " / ".join(f"{value:.2f}" for value in paper) if paper else "–", f"{paper[2] - paper[1]:+.2f}" if paper else "–",
            *(frame.difference(unchosen(rows, name, eta), unchosen(rows, name, 0.0)) for eta in etas),
        ])  # fmt: skip
    headers = ("test error, %", *POLICIES.values(), "MixupE less Mixup", "paper", "paper, less Mixup")
    return frame.Lines((*headers, *(f"unchosen: η = {eta:g} less 0" for eta in etas)), lines,
                       f"Mean ± standard error of {len(frame.distinct(rows, 'seed'))} seeds. Chosen: by each seed's validation rows. "
                       "Unchosen: the mean over α.")  # fmt: skip


def draw(rows: list[frame.Row], figure) -> None:
    figure.set_size_inches(11, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    names = frame.distinct(rows, "data_set")
    for place, name in enumerate(names):
        base = chosen(rows, name, "mixup")
        for shift, policy in ((-0.15, "erm"), (0.15, "full")):
            mean, error = frame.paired(chosen(rows, name, policy), base)
            label = f"{POLICIES[policy]}, ours" if not place else None
            left.errorbar(
                mean, place + shift, xerr=error, fmt="o", color="tab:blue" if policy == "full" else "grey", label=label
            )
            if name in PAPER:
                value = PAPER[name][list(POLICIES).index(policy)] - PAPER[name][1]
                label = f"{POLICIES[policy]}, the paper's" if name == next(n for n in names if n in PAPER) else None
                left.plot(value, place + shift, "*", color="tab:red" if policy == "full" else "black", label=label)
        for index, eta in enumerate(eta for eta in frame.distinct(rows, "eta") if eta):
            mean, error = frame.paired(unchosen(rows, name, eta), unchosen(rows, name, 0.0))
            label = f"η = {eta:g}" if not place else None
            right.errorbar(mean, place + 0.2 * (index - 1), xerr=error, fmt="o", color=f"C{index}", label=label)
    for axis, title in (
        (left, "(α, η) chosen on validation rows"),
        (right, "MixupE less Mixup, mean over α; η not chosen"),
    ):
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel("test error less Mixup's, points; left is better")
        axis.legend(fontsize=7, loc="upper left" if axis is left else "center right")
    left.set_yticks(range(len(names)), names)
