"""``python -m experiments.gallery``: write docs/gallery.md, each experiment's picture, command, claim and finding, from its rows."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import ablation, adversarial, alpha, approximation, frame, images, memorization, perturbed, speech, table4, toy
from .__main__ import EXPERIMENTS

PAGE = Path(__file__).parent.parent / "docs" / "gallery.md"
UCI = " --data FOLDER"
HEAD = """# Gallery

The experiments of the papers behind this project, each one command. Networks here are small and data sets those that wheels carry,
so that figures are to be read for their direction, beside the paper's; each training figure is the mean of eight seeds (ten folds of
graphs) and its standard error, and differences are paired. `python -m experiments` lists the commands; `--quick` tries one in seconds,
a call that is cut off resumes, and rows and pictures are in `experiments/results/`; with other settings (`--seeds`, `--full`, other data) they
are in `run/experiments/`.

`--data FOLDER` is a folder of real sets: ARFF and CSV files (the class last) for the tabular ones, `cifar-10-batches-py`, `cifar-100-python`,
`svhn` (its two `.mat` files), `tiny-imagenet-200` and ImageNet (`train/CLASS`, `val/CLASS`) for images (the extra `real_images` brings what reads them), Google's commands as they are unpacked (or their
spectrograms x and classes y in `commands-train.npz` and `commands-test.npz`) for speech, and folders of TUDatasets for graphs.
`--full` takes the papers' networks and epochs, on the same code: PreActResNet-18 to 101 and WRN-28-10, ResNet-50, ViT-B/16 and timm's CoAtNet-0 on ImageNet,
LeNet and VGG of the papers' widths, a GIN of 64. `--device cuda` trains on a GPU, with data, models and random numbers there; `--only TEXT` runs the cells that have
the text in their names, so that a long run goes in pieces; `--epochs 1` tries one. A test takes a step of each of these networks at its real input size on made-up
files; no GPU has run them yet, and no figure here is theirs.
"""
SECTION = """
## {name}

![{what}](../experiments/results/{name}.png)

`python -m experiments {name}{data}` ({source})

**The paper**: {claim}

**Here**: {found}
"""


class Said(NamedTuple):
    claim: str
    found: Callable[[list[frame.Row]], str]
    data: str = ""


def _mean(rows: list[frame.Row], name: str, digits: int = 1, **where) -> str:
    return frame.pm(frame.column(rows, name, **where), digits)


def _less(rows: list[frame.Row], name: str, of: dict, than: dict, digits: int = 2) -> str:
    return frame.difference(frame.column(rows, name, **of), frame.column(rows, name, **than), digits)


def _table4(rows):
    names = frame.distinct(rows, "data_set")
    less = {name: frame.paired(table4.chosen(rows, name, "full"), table4.chosen(rows, name, "mixup")) for name in names}
    better = [n for n, (mean, error) in less.items() if mean < -2 * error]
    worse = [n for n, (mean, error) in less.items() if mean > 2 * error]
    text = f"Chosen on validation rows, MixupE is below Mixup by two standard errors on {len(better)} of {len(names)} sets and above on {len(worse)}"
    high = {n: frame.paired(table4.unchosen(rows, n, 1.0), table4.unchosen(rows, n, 0.0)) for n in names}
    low = {n: frame.paired(table4.unchosen(rows, n, 1e-3), table4.unchosen(rows, n, 0.0)) for n in names}
    most = max(abs(mean) for mean, _ in low.values())
    changed = [f"{n} {mean:+.2f} ± {error:.2f}" for n, (mean, error) in high.items() if abs(mean) > 2 * error]
    return (f"{text}. Unchosen, η = 0.001 moves no set's error by more than {most:.2f} points; η = 1 does: "
            f"{', '.join(changed) if changed else 'on none by two standard errors'}.")  # fmt: skip


def _images(rows):
    ends = frame.select(rows, kind="end")
    parts = []
    for name, network in dict.fromkeys((row["data_set"], row["network"]) for row in ends):
        own = frame.select(ends, data_set=name, network=network)
        steps = [
            f"{_less(own, 'error', {'method': m}, {'method': 'Mixup'})} ({m})"
            for m in ("ERM", "ERM + R", "MixupE", "MixupE 1/4, γ = 1/4")
        ]
        parts.append(f"{name}, {network}: {', '.join(steps)}")
    own = frame.select(ends, data_set="MNIST-1D")
    zero, high = (_less(own, "error", {"method": f"MixupE, η = {eta}"}, {"method": "Mixup"}) for eta in (0, 1))
    plus = _less(own, "error", {"method": "ERM + R"}, {"method": "ERM"})
    return (f"Test error less Mixup's, points: {'; '.join(parts)}. On MNIST-1D the authors' two calls gain {zero} with η = 0 too, ERM + R less ERM is {plus} and "
            f"η = 1 gives {high}: BatchNorm's statistics of clean rows make the gain, not R.")  # fmt: skip


def _speech(rows):
    last = frame.select(rows, epoch=max(row["epoch"] for row in rows))
    parts = []
    for network in frame.distinct(last, "network"):
        own = frame.select(last, network=network)
        parts.append(f"{network} " + " / ".join(_mean(own, "error", 2, method=m) for m in ("ERM", "Mixup", "MixupE")))
    warm = "; ".join(f"{n} {_less(frame.select(last, network=n), 'error', {'method': 'Mixup, warm-up'}, {'method': 'Mixup'})}"
                     for n in frame.distinct(last, "network"))  # fmt: skip
    return f"On nine speakers, ERM / Mixup / MixupE: {'; '.join(parts)} %. The warm-up changes Mixup's error by {warm} points."


def _graphs(rows):
    figures = [f"{_mean(rows, 'late', method=m)} ({m})" for m in frame.distinct(rows, "method")]
    less = [_less(rows, "late", {"method": f"MixupE, {a}"}, {"method": f"Mixup, {a}"}, 1) for a in ("α = 0.2", "α = 1")]
    high = _less(rows, "late", {"method": "MixupE, α = 1, η = 1"}, {"method": "ERM"}, 1)
    return (f"MUTAG, error in percent: {', '.join(figures)}. MixupE less Mixup is {less[0]} at α = 0.2 and {less[1]} at α = 1, no mixing is "
            f"below ERM, and η = 1 is {high} points above it.")  # fmt: skip


def _approximation(rows):
    last = {"method": "Mixup", "epoch": max(row["epoch"] for row in rows)}
    low, middle, high = (frame.mean_error(frame.column(rows, f"alpha_{q}", **last))[0] for q in (5, 50, 95))
    share, small = (frame.pm(approximation.ratios(rows, s, **last)) for s in (1.0, 0.01))
    return (f"After training α is {middle:.2f} in the median ({low:.2f} to {high:.2f} for 90 % of logits), so that q̂ ({_mean(rows, 'approximate', 3, **last)}) "
            f"is close to q ({_mean(rows, 'exact', 3, **last)}). The first order is {share} of L_mix − L_std, and {small} of it when 1 − λ is a hundredth: "
            "what mixup does is mostly of higher order.")  # fmt: skip


def _toy(rows):
    steps = sorted(frame.distinct(frame.select(rows, kind="linear"), "step"))
    first, last = steps[2], steps[-1]
    where = {"kind": "linear", "step": last}
    bands = [f"{m} {_mean(rows, 'band', 0, kind='boundary', method=m)}" for m in toy.NETWORKS]
    return (f"Mixup's norm is {_mean(rows, 'norm', 2, kind='linear', method='Mixup', step=first)} after {first} steps and {_mean(rows, 'norm', 2, method='Mixup', **where)} after {last}, "
            f"ERM's still grows ({_mean(rows, 'norm', 2, method='ERM', **where)}); Mixup's direction stays {_mean(rows, 'angle', 1, method='Mixup', **where)}° off the largest margin, ERM's is "
            f"{_mean(rows, 'angle', 1, method='ERM', **where)}° off and nearing. Share of the square on which the network is less than 90 % sure, in percent: {', '.join(bands)}.")  # fmt: skip


def _between(rows):
    return (f"At the middle of two classes ERM says a third one on {_mean(rows, 'miss', method='ERM', lam=0.5)} % of pairs and Mixup on "
            f"{_mean(rows, 'miss', method='Mixup', lam=0.5)} %; its Jacobian is {_mean(rows, 'norm', method='Mixup', lam=0.5)} against "
            f"{_mean(rows, 'norm', method='ERM', lam=0.5)}. MixupE at η = 0.001 less Mixup is {_less(rows, 'miss', {'method': 'MixupE', 'lam': 0.5}, {'method': 'Mixup', 'lam': 0.5})} points of pairs: all but the same.")  # fmt: skip


def _memorization(rows):
    half = frame.select(rows, corrupted=0.5)
    mixes = ", ".join(_mean(half, "last", method=f"Mixup, α = {a}") for a in (1, 2, 8, 32))
    return (f"At 50 % random labels the last epoch's test error is {_mean(half, 'last', method='ERM')} % for ERM and {mixes} % for α = 1, 2, 8, 32. "
            f"Dropout alone does as well ({_mean(half, 'last', method='dropout')} %), and the two together best ({_mean(half, 'last', method='Mixup, α = 8, dropout')} %).")  # fmt: skip


def _adversarial(rows):
    def both(box, attack, step):
        where = {"box": box, "attack": attack, "step": step}
        return f"{_mean(rows, 'error', method='ERM', **where)} → {_mean(rows, 'error', method='Mixup', **where)}"

    return (f"Against another network's gradients Mixup helps: FGSM at 4/255 {both('black', 'FGSM', '4/255')} %, I-FGSM at 32/255 {both('black', 'I-FGSM', '32/255')} %. "
            f"Against its own it does not, other than in the paper: FGSM at 4/255 {both('white', 'FGSM', '4/255')} %, at 32/255 {both('white', 'FGSM', '32/255')} %.")  # fmt: skip


def _gan(rows):
    figures = frame.select(rows, kind="distance")
    last = max(row["step"] for row in figures)
    ring, spiral = (
        ", ".join(_mean(figures, "distance", 3, data=d, alpha=a, step=last) for a in (0.0, 0.2, 1.0))
        for d in ("ring", "spiral")
    )
    return (f"On the ring of eight modes the energy distance is {ring} plain and with α = 0.2, 1: steadier with mixup, by little more than one standard error. "
            f"On the spiral it is {spiral}: mixup learns it more slowly.")  # fmt: skip


def _ablation(rows):
    def less(method):
        return _less(rows, "error", {"method": method}, {"method": "ERM"})

    agree = sum((frame.paired(frame.column(rows, "error", method=m), frame.column(rows, "error", method="ERM"))[0] < 0) == (v < ablation.PAPER["ERM"])
                for m, v in ablation.PAPER.items() if m not in ("ERM", "noise 0.05"))  # fmt: skip
    return (f"Less ERM, points: mixup {less('mixup, AC + RP')}, after the first or second layer {less('layer 1')} and {less('layer 2')}, within a class "
            f"{less('SC + RP')}, inputs only {less('inputs only, AC + RP')}, smoothing by 0.2 {less('smoothing 0.2')}. "
            f"The sign is the paper's for {agree} of {len(ablation.PAPER) - 2} rows; label smoothing alone is best here, and mixing within a class harms.")  # fmt: skip


def _alpha(rows):
    def gap(strength, kind):
        return frame.pm(alpha.gaps(rows, strength, kind), 3)

    return (f"Against mixed training rows the gap grows from {gap(0.1, 'mixed')} at α = 0.1 to {gap(4.0, 'mixed')} at α = 4; against clean ones it stays between "
            f"{gap(0.1, 'clean')} and {gap(4.0, 'clean')} (ERM {gap(0.0, 'clean')}). Most of the growth is that of the mixed targets' own entropy, below which no loss can fall.")  # fmt: skip


def _variance(rows):
    own = frame.select(rows, kind="complexity", dimension=128, alpha=1.0)
    fall = frame.pm([row["before"] - row["after"] for row in own], 3)
    total, coordinate = (frame.mean_error(frame.column(own, name))[0] for name in ("total", "coordinate"))

    def shrink(kind):
        chosen = frame.select(rows, kind=f"Hessian's trace, {kind}", alpha=1.0)
        return frame.pm([row["after"] / row["before"] for row in chosen])

    return (f"In 128 dimensions at α = 1 the complexity falls by {fall}: below {total:.3f}, the bound by the total variance, and above {coordinate:.3f}, by one coordinate's. "
            f"The Hessian's trace at mixed rows is {shrink('W = 0')} of that at clean ones at W = 0, as 1 − w = 0.67 says, and {shrink('Mixup')} after training, for mixed rows lie nearer to the boundary.")  # fmt: skip


def _perturbed(rows):
    risk = frame.select(rows, kind="identity")[0]
    (law,) = frame.select(rows, kind="moments", name="Beta(1/2)")
    trained = frame.select(rows, kind="training")
    parts = []
    for name in frame.distinct(trained, "data_set"):
        own = frame.select(trained, data_set=name)
        parts.append(
            f"{name} {_less(own, 'error', {'name': 'Mixup'}, {'name': 'ERM'})} and {_less(own, 'error', {'name': 'Approximated Mixup'}, {'name': 'ERM'})}"
        )
    return (f"Both sides of the identity are {risk['left']:.4g}, equal to rounding, and θ of Beta(½, ½) has mean {law['theta_mean']:.4f} and variance {law['theta_variance']:.4f}, as printed. "
            f"Less ERM, points, Mixup and Approximated Mixup: {'; '.join(parts)}.")  # fmt: skip


def _learned(rows):
    parts = []
    for case in frame.distinct(rows, "case"):
        ends, paths = frame.select(rows, kind="end", case=case), frame.select(rows, kind="path", case=case)
        last = frame.column(paths, "alpha", epoch=max(row["epoch"] for row in paths))
        fixed = min(
            (m for m in frame.distinct(ends, "method") if m != "learned"),
            key=lambda m, e=ends: frame.mean_error(frame.column(e, "error", method=m))[0],
        )
        parts.append(f"{case}: α goes to {frame.pm(last)}, error {_mean(ends, 'error', 2, method='learned')} % against {_mean(ends, 'error', 2, method='ERM')} for ERM and "
                     f"{_mean(ends, 'error', 2, method=fixed)} for the best that is fixed ({fixed})")  # fmt: skip
    return "; ".join(parts) + ". Validation labels, which α follows, are right in both."


def _least(method: str) -> int:
    """On how many of the paper's tabular sets a method has the least error."""
    return sum(min(errors) == errors[("ERM", "Mixup", "MixupE").index(method)] for errors in table4.PAPER.values())


CIFAR, COMMANDS = images.PAPER, " / ".join(f"{error:.2f}" for error in speech.PAPER["VGG-11"])
WHITE, BLACK = (adversarial.PAPER[box, "FGSM"] for box in adversarial.BOXES)
NOISY = {method: last for (share, method), (_, last, _, _) in memorization.PAPER.items() if share == 0.5}
SAID = {
    "table4": Said(f"MixupE has the least error on {_least('MixupE')} of {len(table4.PAPER)} tabular sets, Mixup on {_least('Mixup')}, ERM on {_least('ERM')}.", _table4, UCI),
    "images": Said(f"MixupE lowers CIFAR-100's error from {CIFAR['Mixup']} to {CIFAR['MixupE']} % (PreActResNet-50), and R alone that of ERM from {CIFAR['ERM']} to {CIFAR['ERM + R']} %.", _images),
    "speech": Said(f"VGG-11 errs on {COMMANDS} % of commands by ERM / Mixup / MixupE; mixup's authors find that {speech.WARM_UP} epochs of warm-up speed up the start.", _speech),
    "graphs": Said("MixupE improves on Mixup on graphs too (abstract), mixed at the read-out.", _graphs),
    "approximation": Said("∇f_k(x)ᵀ(E[x′] − x) is nearly −f_k(x), so that q̂ of the logits stands for q.", _approximation, UCI),
    "toy": Said("Mixup's transition between classes is wide; the slides ask what a linear classifier converges to.", _toy),
    "between": Said("Mixup errs less between samples and has smaller gradients there.", _between, UCI),
    "memorization": Said(f"Mixup with a large α keeps networks from learning random labels: {NOISY['Mixup, α = 32']} % at the last epoch (α = 32) against {NOISY['ERM']} % at 50 % noise, {NOISY['dropout']} % by dropout, and {NOISY['Mixup, α = 8, dropout']} % by both.", _memorization, UCI),
    "adversarial": Said(f"Mixup lowers the error under FGSM from {WHITE['ERM']} to {WHITE['Mixup']} % (white box) and from {BLACK['ERM']} to {BLACK['Mixup']} % (black box) on ImageNet.", _adversarial, UCI),
    "gan": Said("Mixup steadies the training of generative adversarial networks.", _gan),
    "ablation": Said(f"Mixing inputs and labels of random pairs is best ({ablation.PAPER['mixup, AC + RP']} % against {ablation.PAPER['ERM']} % by ERM), mixing early layers nearly so; inputs only, and smoothing, gain little.", _ablation, UCI),
    "alpha": Said(f"The generalization gap grows with α, from {alpha.PAPER[0.1]:.3f} at α = 0.1 to {alpha.PAPER[4.0]:.3f} at α = 4.", _alpha, UCI),
    "variance": Said("Mixing lowers the Rademacher complexity, by at most a term in the variance of the inputs, and the curvature.", _variance),
    "perturbed": Said("Mixup is training on samples pulled towards the mean, with noise of mean 0; θ̄ is {} and its variance {} for Beta(½, ½).".format(*perturbed.PAPER["Beta(1/2)"]), _perturbed, UCI),
    "learned": Said("The slides propose to learn λ's law, as MetaMixup does.", _learned, UCI),
}  # fmt: skip


def page() -> str:
    sections = []
    for name, entry in EXPERIMENTS.items():
        said = SAID[name]
        found = said.found(frame.read(frame.RESULTS / f"{name}.csv"))
        sections.append(
            SECTION.format(
                name=name, what=entry.what, source=entry.source, claim=said.claim, found=found, data=said.data
            )
        )
    return HEAD + "".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page())
