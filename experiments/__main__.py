"""``python -m experiments NAME [--quick]``: run one experiment of the papers; without a name, list them."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from . import frame


class Entry(NamedTuple):
    source: str
    what: str


EXPERIMENTS = {
    "table4": Entry("MixupE §4.2", "tabular sets: test error by policy, chosen and unselected η"),
    "images": Entry("MixupE §4.1, 4.5", "networks with BatchNorm: errors, loss curves, ERM + R, η, deformations"),
    "speech": Entry("MixupE §4.3; mixup §3.3", "utterances by LeNet and VGG, with a warm-up on plain samples"),
    "graphs": Entry("MixupE §4.4", "GIN on molecules, mixed at the read-out, 10 folds"),
    "approximation": Entry("MixupE §2", "α_{k,i}, exact q against q̂, the share of the first order in L_mix − L_std"),
    "toy": Entry("slides; mixup Fig. 1b", "decision boundaries; norm, angle and margin of a linear classifier"),
    "between": Entry("mixup Fig. 2", "errors and gradient norms between training samples"),
    "memorization": Entry("mixup §3.4", "random labels: best and last epoch, what is learned of wrong labels"),
    "adversarial": Entry("mixup §3.5", "FGSM and I-FGSM, white and black box"),
    "gan": Entry("mixup §3.7", "mixup's discriminator loss on 2-D data"),
    "ablation": Entry(
        "mixup §3.8", "what is mixed with what: inputs only, neighbours, classes, layers, smoothing, noise"
    ),
    "alpha": Entry("Kimura, Table 1", "generalization gap against α, by clean and by mixed training loss"),
    "variance": Entry("Kimura, Theorem 2", "the complexity bound by simulation, and the Hessian under mixing"),
    "perturbed": Entry("Carratino et al.", "mixup as perturbed ERM: identity, moments of θ, Approximated Mixup"),
    "learned": Entry("Carratino, slides", "λ's law learned by a meta gradient"),
}

# What else is trained, with options of its own: name → (module with main(arguments) -> exit status, what it does).
COMMANDS = {
    "quality": (
        "tabular",
        "test error per policy at equal epochs and at equal time: tables; `quality images`: BatchNorm",
    ),
    "demo": ("demo", "train a tabular network and a CNN with BatchNorm: one table, one picture"),
}


def device(text: str) -> torch.device:
    """The device of that name, tried by a tensor that goes there and back."""
    try:
        found = torch.device(text)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError) as error:  # an assertion if torch is built without that kind
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"expected a device that torch has here, like cpu or cuda, got {text!r}: {reason}"
        ) from None
    return found


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")
    return Path(text)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def listing() -> str:
    lines = (f"  {name:14} {entry.source:24} {entry.what}" for name, entry in EXPERIMENTS.items())
    others = (f"  {name:14} {what}" for name, (_, what) in COMMANDS.items())
    usage = "usage: python -m experiments NAME [--quick | --full] [--data FOLDER] [--device cuda]\n"
    return "\n".join(
        [usage, *lines, "\nof this package's own policies, with options of their own (--help):\n", *others]
    )


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(f"experiments.quality.{COMMANDS[arguments[0]][0]}").main(arguments[1:])
    if not arguments or arguments[0] not in EXPERIMENTS:
        print(listing())
        return 2 if arguments and arguments[0] not in ("-h", "--help") else 0
    name = arguments[0]
    entry = EXPERIMENTS[name]
    module = importlib.import_module(f"experiments.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny data and few steps, to try the command")
    size.add_argument("--full", action="store_true", help="the paper's networks and epochs")
    parser.add_argument(
        "--device", type=device, default="cpu", help="where networks are trained: cpu (default), cuda, cuda:1"
    )
    parser.add_argument(
        "--epochs", type=positive, help="epochs (of gan: steps) in place of the experiment's own, to try a run"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="run the cells that have this in their names, in pieces of a long run",
    )
    parser.add_argument("--seeds", type=positive, help="trainings of each kind, paired by seed (default 8; quick: 2)")
    parser.add_argument("--data", type=folder, help="folder of real sets (docs/gallery.md says which are read)")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier call's rows instead of resuming")
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write (default: experiments/results; run/experiments if quick, or if the rows there are of other settings)",
    )
    given = parser.parse_args(arguments[1:])
    torch.set_num_threads(given.threads)
    seeds = given.seeds or (2 if given.quick else 8)
    options = frame.Options(given.quick, given.full, seeds, given.data, given.device, given.epochs)
    cells = [str(cell) for cell in module.cells(options)]
    if not any(given.only in cell for cell in cells):
        parser.error(
            f"argument --only: expected a part of a cell's name, got {given.only!r}; the cells: {'; '.join(cells)}"
        )
    out = given.out or frame.place(name, options)
    title = f"{name}: {entry.what} ({entry.source})"
    frame.execute(module, name, title, options, out, given.fresh, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
