"""What pages say in words, and the figures within their sentences, are what committed rows and experiments' settings say."""

import re
import statistics
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

import mixupe_kernels as mk
from bench import report, results
from bench.methods import TARGET_RATIO
from bench.models import PreActBlock
from experiments import ablation, alpha, approximation, frame, gallery, image_data
from experiments.quality import images, plan, summary
from experiments.quality.plan import Run

ROOT = Path(__file__).parents[2]
WORDS = dict(
    enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"])
)
ROWS = {name: frame.read(frame.RESULTS / f"{name}.csv") for name in gallery.SAID}


def less(name, figure, of, than):
    """(mean, standard error) of a column of one method less that of another."""
    return frame.paired(frame.column(ROWS[name], figure, **of), frame.column(ROWS[name], figure, **than))


def below(difference):
    return difference[0] < -2 * difference[1]


def above(difference):
    return difference[0] > 2 * difference[1]


def level(difference):
    return abs(difference[0]) <= 2 * difference[1]


def mean(name, figure, **where):
    return statistics.mean(frame.column(ROWS[name], figure, **where))


def best(name, figure, method, **where):
    """Whether no other method has a smaller mean."""
    methods = frame.distinct(ROWS[name], "method")
    return min(methods, key=lambda other: mean(name, figure, method=other, **where)) == method


def of_images(method, than="Mixup"):
    where = {"kind": "end", "data_set": "MNIST-1D"}
    return less("images", "error", {**where, "method": method}, {**where, "method": than})


def of_attack(box, attack, step):
    where = {"box": box, "attack": attack, "step": step}
    return less("adversarial", "error", {**where, "method": "Mixup"}, {**where, "method": "ERM"})


def of_gan(data, strength):
    where = {"kind": "distance", "data": data, "step": 4000}
    return less("gan", "distance", {**where, "alpha": strength}, {**where, "alpha": 0.0})


def toy(figure, method):
    """Means at the last two looks."""
    return [mean("toy", figure, kind="linear", method=method, step=step) for step in (10_000, 30_000)]


def within_class():
    return less("ablation", "error", {"method": "SC + RP"}, {"method": "ERM"})


def entropy_of_targets(strength):
    return mean("alpha", "target_entropy", alpha=strength)


def gap(strength, kind="mixed"):
    return statistics.mean(alpha.gaps(ROWS["alpha"], strength, kind))


# A phrase of the gallery → whether the rows say so.
FOUND = {
    "images": {
        "gain -6.03 ± 0.43 with η = 0 too": lambda: below(of_images("MixupE, η = 0")),
        "BatchNorm's statistics of clean rows make the gain, not R": lambda: (
            level(less("images", "error", *({"kind": "end", "data_set": "MNIST-1D", "method": m} for m in ("MixupE", "MixupE, η = 0"))))
            and of_images("ERM + R", "ERM")[0] > 0
            and above(of_images("MixupE, η = 1"))
        ),
    },
    "graphs": {
        "no mixing is below ERM": lambda: best("graphs", "late", "ERM"),
        "points above it": lambda: above(less("graphs", "late", {"method": "MixupE, α = 1, η = 1"}, {"method": "ERM"})),
    },
    "approximation": {
        "is close to q": lambda: (
            abs(mean("approximation", "approximate", method="Mixup", epoch=100) / mean("approximation", "exact", method="Mixup", epoch=100) - 1) < 0.15
        ),
        "mostly of higher order": lambda: max(approximation.ratios(ROWS["approximation"], 1.0, method="Mixup", epoch=100)) < 0.5,
    },
    "toy": {
        "ERM's still grows": lambda: toy("norm", "ERM")[1] > toy("norm", "ERM")[0] + 1,
        "Mixup's direction stays": lambda: abs(toy("angle", "Mixup")[1] - toy("angle", "Mixup")[0]) < 0.1,
        "off and nearing": lambda: toy("angle", "ERM")[1] < toy("angle", "ERM")[0],
    },
    "between": {
        "points of pairs: all but the same": lambda: (
            abs(less("between", "miss", {"method": "MixupE", "lam": 0.5}, {"method": "Mixup", "lam": 0.5})[0]) < 0.1
        ),
    },
    "memorization": {
        "Dropout alone does as well": lambda: (
            mean("memorization", "last", corrupted=0.5, method="dropout") <= mean("memorization", "last", corrupted=0.5, method="Mixup, α = 32")
        ),
        "and the two together best": lambda: best("memorization", "last", "Mixup, α = 8, dropout", corrupted=0.5),
    },
    "adversarial": {
        "Against another network's gradients Mixup helps": lambda: (
            below(of_attack("black", "FGSM", "4/255")) and below(of_attack("black", "I-FGSM", "32/255"))
        ),
        "Against its own it does not": lambda: not any(below(of_attack("white", "FGSM", step)) for step in ("4/255", "32/255")),
    },
    "gan": {
        "steadier with mixup, by little more than one standard error": lambda: all(
            -2 < of_gan("ring", strength)[0] / of_gan("ring", strength)[1] < -1 for strength in (0.2, 1.0)
        ),
        "mixup learns it more slowly": lambda: above(of_gan("spiral", 1.0)),
    },
    "ablation": {
        "label smoothing alone is best here": lambda: any(best("ablation", "error", f"smoothing {s}") for s in (0.05, 0.1, 0.2)),
        "mixing within a class harms": lambda: above(within_class()),
    },
    "alpha": {
        "the gap grows": lambda: all(gap(a) < gap(b) for a, b in zip(alpha.ALPHAS[1:], alpha.ALPHAS[2:], strict=False)),
        "it stays between": lambda: all(gap(0.1, "clean") <= gap(a, "clean") <= gap(4.0, "clean") for a in alpha.ALPHAS[1:-1]),
        "Most of the growth is that of the mixed targets' own entropy": lambda: (
            entropy_of_targets(4.0) - entropy_of_targets(0.1) > 0.5 * (gap(4.0) - gap(0.1))
        ),
    },
    "variance": {
        "for mixed rows lie nearer to the boundary": lambda: all(
            row["after"] > 0.67 * row["before"] for row in ROWS["variance"] if row["kind"] == "Hessian's trace, Mixup" and row["alpha"] == 1
        ),
    },
    "perturbed": {
        "equal to rounding": lambda: all(
            abs(row["left"] - row["right"]) < 1e-5 for row in frame.select(ROWS["perturbed"], kind="identity")
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("name, phrase", [(name, phrase) for name, phrases in FOUND.items() for phrase in phrases])
def test_a_word_of_the_gallery_is_true_of_the_rows(name, phrase):
    assert phrase in gallery.SAID[name].found(ROWS[name]) and FOUND[name][phrase]()


def test_the_ablation_counts_agreements_that_are_there():
    assert len(ablation.PAPER) == 16


class Recipe:
    """The rows of ``quality images``, which README and docs/recipes.md speak of."""

    def __init__(self):
        rows = report._read(report.IMAGES / "summary.csv")
        self.epochs, self.time = (report._places(rows, budget) for budget in ("epochs", "time"))
        self.costs = report._read(report.IMAGES / "costs.csv")
        self.runs = results.read_csv(report.IMAGES / "runs.csv", Run)

    def count(self, budget, base):
        """Places where the recipe is better than ``base`` by more than two standard errors, and where it is worse."""
        rows = [methods[report.RECIPE] for methods in getattr(self, budget).values()]
        differences = [(float(row[f"error_less_{base}"]), float(row[f"error_less_{base}_error"])) for row in rows]
        return sum(map(below, differences)), sum(map(above, differences))

    def step(self, method, fraction, data_set=None):
        """Times of a step over Mixup's, sorted."""
        return sorted(
            float(row["median"]) for row in self.costs
            if (row["method"], float(row["fraction"])) == (method, fraction) and data_set in (None, row["data_set"])
        )  # fmt: skip

    def trained_for(self, network, method):
        return sorted({int(m[method]["epochs"]) for place, m in self.time.items() if place[1] == network})

    def error(self, place, method, figure="error"):
        return float(self.epochs[place][method][figure])

    def places(self, *methods, **where):
        """Where all of these methods were trained."""
        axes = ("data_set", "network", "alpha")
        return [p for p, m in self.epochs.items()
                if all(x in m for x in methods) and all(p[axes.index(name)] == value for name, value in where.items())]  # fmt: skip

    def all_smaller(self, ours, theirs, figure="error", **where):
        found = self.places(ours, theirs, **where)
        assert found
        return all(self.error(p, ours, figure) < self.error(p, theirs, figure) for p in found)


def split(gamma, eta):
    return ("split", 0.25, gamma, eta)


QUALITY = Recipe()
UPDATE_BN, ERM, REGMIXUP = (
    ("update_bn", 0.0, 0.0, 0.0), ("erm", 0.0, 0.0, 0.0), ("joint", 1.0, 1.0, 0.0)
)  # fmt: skip
RECIPES, README = "docs/recipes.md", "README.md"


def numbers(values, digits=2):
    return tuple(f"{value:.{digits}f}" for value in values)


def words(*values):
    return tuple(WORDS[value] for value in values)


def set_up():
    """Networks, sets, seeds and the size of a batch; rows of the signals; size and rows of each set of images."""
    signals, *of_images = image_data.SETS.values()
    sizes = ["×".join(map(str, kind.shape)) for kind in of_images]
    rows = [", ".join(map(str, kind.rows)) for kind in (signals, *of_images)]
    counts = words(len(plan.NETWORKS), len(rows), plan.SEEDS)
    return (*counts, str(images.BATCH), rows[0], sizes[0], rows[1], sizes[1], rows[2])


def networks():
    """Convolutions and epochs of the CNN; blocks, their channels and epochs of the PreActResNet."""
    cnn, resnet = plan.NETWORKS.values()
    convolutions = [layer for layer in cnn.build() if isinstance(layer, nn.Conv2d)]
    channels = [str(block.convolutions[-1].out_channels) for block in resnet.build() if isinstance(block, PreActBlock)]
    return (
        *words(len(convolutions)), str(cnn.epochs), *words(len(channels)), ", ".join(channels), str(resnet.epochs),
    )  # fmt: skip


def equal_epochs():
    counts = [QUALITY.count("epochs", base) for base in ("mixup", "update_bn", "authors")]
    better, worse = zip(*counts, strict=True)
    assert not any(worse)
    return words(min(better), max(better), len(QUALITY.epochs))


def equal_time():
    step = QUALITY.step("split", 0.25)
    epochs = [*QUALITY.trained_for("PreActResNet", report.RECIPE), *QUALITY.trained_for("PreActResNet", ("mixup", 0.0, 0.0, 0.0)),
              *QUALITY.trained_for("small CNN", report.RECIPE), *QUALITY.trained_for("small CNN", ("mixup", 0.0, 0.0, 0.0))]  # fmt: skip
    return (
        *numbers((step[0], step[-1], 1 + plan.RECIPE.fraction)),
        *map(str, epochs),
        *words(QUALITY.count("time", "mixup")[1], QUALITY.count("time", "update_bn")[1]),
    )


def where_mixing_hurts():
    assert QUALITY.all_smaller(ERM, report.RECIPE, data_set="MNIST-1D")
    assert QUALITY.all_smaller(REGMIXUP, report.RECIPE, data_set="MNIST-1D")
    return numbers(QUALITY.step("joint", 1.0, "MNIST-1D"), 1)


def by_eta(method, fraction):
    """The error with η = 1e-3 less that with η = 0 where a method has both, paired by seed, at equal epochs."""
    found = {}
    for run in QUALITY.runs:
        full = run.epochs == plan.NETWORKS[run.network].epochs
        if full and (run.method, run.fraction) == (method, fraction) and run.eta in (0.0, 1e-3):
            place = (run.data_set, run.network, run.alpha, run.gamma)
            found.setdefault(place, {}).setdefault(run.eta, {})[run.seed] = run
    both = [runs for runs in found.values() if len(runs) == 2]
    assert both and all(len(of_seed) == plan.SEEDS for runs in both for of_seed in runs.values())
    return [summary.paired(runs[1e-3], runs[0.0], lambda run: run.test_error) for runs in both]


def changes_nothing():
    found = by_eta("split", 0.25)
    assert all(abs(mean) / error < stats.t.ppf(0.975, 7) for mean, error in found)
    return numbers([max(abs(mean) for mean, _ in found)])


# (page, a sentence, with its figures in brackets; the figures, or whether it is so)
SENTENCES = [
    (RECIPES, r"(\w+) small networks, (\w+) sets, (\w+) seeds that all methods share .*, batches of (\d+)\. Rows to train, validate and "
              r"test with: MNIST-1D ([\d, ]+); MNIST 5000 at ([\d×]+) ([\d, ]+); digits at ([\d×]+) ([\d, ]+)\.", set_up),
    (RECIPES, r"A CNN of (\w+) convolutions has (\d+) epochs, a PreActResNet of (\w+) blocks \(([\d, ]+) channels\) (\d+)\.", networks),
    (RECIPES, r"takes the error lower still, at ([\d.]+) rows instead of (\d)\.",
     lambda: (*numbers([1 + plan.RECIPE.fraction]), *numbers([1 + plan.AUTHORS.fraction], 0))),
    (RECIPES, r"the recipe is nowhere worse than Mixup, than Mixup with `update_bn`, or than the authors' form, "
              r"and better than each in (\w+) or (\w+) of (\w+) places", equal_epochs),
    (RECIPES, r"A step of the recipe costs ([\d.]+) to ([\d.]+) of Mixup's, for ([\d.]+) as many rows\. At equal time those are (\d+) epochs "
              r"for (\d+), or (\d+) or (\d+) for (\d+), .* worse than Mixup in (\w+) places, and worse than Mixup with `update_bn`, "
              r"which costs next to nothing, in (\w+):", equal_time),
    (RECIPES, r"On MNIST-1D, where mixing itself hurts, ERM is better than the recipe, and so is RegMixup with all the clean rows at γ = 1 "
              r"\(([\d.]+) or ([\d.]+) of Mixup's step there\)", where_mixing_hurts),
    (RECIPES, r"γ = 1 at 1/4 is no worse than γ = 1/4 on the CNN, and behind Mixup on the PreActResNet for MNIST-1D at α = 0\.2",
     lambda: QUALITY.all_smaller(split(1.0, 1e-3), report.RECIPE, network="small CNN")
     and QUALITY.error(("MNIST-1D", "PreActResNet", "0.2"), split(1.0, 1e-3), "error_less_mixup") > 0),
    (RECIPES, r"with η = 0 they gain as much",
     lambda: all(map(level, by_eta("two calls", 1.0)))),
    (RECIPES, r"At α = 1 `update_bn` after plain Mixup, one more pass over the data in a whole training, gains as much or more",
     lambda: QUALITY.all_smaller(UPDATE_BN, report.AUTHORS, alpha="1.0")),
    (RECIPES, r"γ = ρ on the same rows takes the error lower still",
     lambda: QUALITY.count("epochs", "authors")[0] >= 6 and not QUALITY.count("epochs", "authors")[1]),
    (RECIPES, r"At η = 1e-3 it changes the error by at most ([\d.]+) points, none of it told by a paired t-test of the eight seeds at 5 %", changes_nothing),
    (RECIPES, r"At η = 1 it improves calibration, and costs error where the clean rows have no cross-entropy, and on MNIST-1D",
     lambda: all(QUALITY.all_smaller(split(gamma, 1.0), split(gamma, 0.0), "ece") for gamma in (0.0, 0.25, 1.0))
     and QUALITY.all_smaller(split(0.0, 0.0), split(0.0, 1.0))
     and all(QUALITY.all_smaller(split(gamma, 0.0), split(gamma, 1.0), data_set="MNIST-1D") for gamma in (0.25, 1.0))),
    (README, r"At equal epochs the recipe is nowhere worse than Mixup or than the authors' form, and costs less than theirs",
     lambda: not any(QUALITY.count("epochs", base)[1] for base in ("mixup", "authors"))
     and QUALITY.step("split", 0.25)[-1] < QUALITY.step("two calls", 1.0)[0]),
    (README, r"the paper's regularizer at η = 1e-3 makes none that eight seeds can tell", lambda: bool(changes_nothing())),
    (README, r"A step costs about ([\d.]+) of Mixup's", lambda: numbers([statistics.median(QUALITY.step("split", 0.25))], 1)),
    (README, r"at equal \*time\*, .* worth it in some places and not in others",
     lambda: all(QUALITY.count("time", "mixup"))),
]  # fmt: skip


@pytest.mark.parametrize("page, sentence, figures", SENTENCES, ids=[f"{p}: {s[:50]}" for p, s, _ in SENTENCES])
def test_a_sentence_is_true_of_the_rows(page, sentence, figures):
    text = " ".join((ROOT / page).read_text().split())
    said = re.search(sentence, text)
    assert said, "the page has another sentence: change this one with it"
    expected = figures()
    assert expected is True or tuple(figure.lower() for figure in said.groups()) == expected


def test_the_policies_have_as_many_rows_as_their_table_says():
    policies = re.findall(r"\| `(Mixup.*?)` \| ([\d.]+) × ", (ROOT / RECIPES).read_text())
    x, labels = torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64)
    for constructor, said in policies:
        mixer = eval(constructor, {"Mixup": mk.Mixup, "MixupE": mk.MixupE, "alpha": 1.0})
        rows = [len(mixer(x, labels)[0]) for _ in range(4)]
        assert float(said) == sum(rows) / (4 * len(x)), constructor
    assert len(policies) == 7


def test_the_target_is_that_of_the_bars():
    assert QUALITY.step("split", 0.25)[-1] <= TARGET_RATIO
