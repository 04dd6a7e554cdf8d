"""``python -m bench step``: the time of a whole training step, per model and way to train, over a Mixup step's.

A step is the batch, forward, loss, backward and optimizer, on a batch that lies on the device. All ways take turns round
by round in one process, each between two turns of eager Mixup, and a ratio is the median of the rounds' ratios to these;
our own Mixup has several turns in a round, of which it is the mean. A step's own part, the batch, the loss and the loss's
backward, is timed without the model too. Mixup "eager" is timm's: the flip pairing, in place, dense soft targets,
``SoftTargetCrossEntropy``. The 1.3× target is met where the step costs at most 1.3× of both eager Mixup's and our own,
which has every optimization that ours has.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixupe_kernels import backends

from . import models, results, timing, training_plots
from .methods import TARGET_RATIO
from .step_methods import BASE, INTERVAL, Method, make_methods

# Mostly the steady state of training: in turns of 10 ms the first steps after another contender's weighed in.
TURN_SECONDS = 5e-2
FULL_RUN_ONLY = (
    "MixupE sample 1/4",
    "MixupE sample 1/16",
    "MixupE split 1/8",
    f"MixupE interval {INTERVAL}",
    "MixupE exact q",
)
# The bar of our own Mixup, at most eager Mixup's step, is where the two are alike: a turn a round does not tell them apart.
TURNS_A_ROUND = {"Mixup": 5}
MOST_OWN_ROUNDS = 31


@dataclasses.dataclass
class StepRow:
    """One way to train one model. ``seconds`` is the median time of a step; ``ratio``, to eager Mixup, has its quartiles and
    its standard error.

    ``own_seconds`` is what the batch, the loss and the loss's backward take: the rest of a step is the same for every way
    with as many rows. None in modes other than eager, and where the loss differentiates the model.
    ``peak_bytes`` is what a step holds at most beyond what it starts with. ``share`` is u, the part of a Mixup step that
    grows with the rows: twice the batch costs 1 + u. ``prediction`` is 1 + (extra rows / batch)·u.
    """

    model: str
    device: str
    mode: str
    batch: int
    method: str
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_error: float
    ratio_ours: float
    target_met: bool
    own_seconds: float | None
    peak_bytes: int
    share: float
    prediction: float | None


class Spec(NamedTuple):
    """A model and how its paper trains it."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    optimizer: Callable[..., torch.optim.Optimizer]
    rounds: int
    needs_gpu: bool = False


def _adam(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, **options)


def _sgd(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def _adamw(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, **options)


SPECS = (
    Spec("MLP 64-128-128-10", lambda: models.mlp(64, 10), (64,), 10, 100, _adam, 201),
    Spec("LeNet 1x160x101", models.lenet, (1, 160, 101), 30, 100, _adam, 9),
    Spec("PreActResNet-18 3x32x32", models.preact_resnet18, (3, 32, 32), 100, 100, _sgd, 7),
    Spec("PreActResNet-50 3x32x32", models.preact_resnet50, (3, 32, 32), 100, 100, _sgd, 15, True),
    Spec("ResNet-50 3x224x224", models.resnet50, (3, 224, 224), 1000, 256, _sgd, 15, True),
    Spec("ViT-B/16 3x224x224", models.vit_b16, (3, 224, 224), 1000, 256, _adamw, 15, True),
)


def peak_bytes(model: nn.Module, call: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that a call holds beyond parameters and optimizer state; gradients count."""
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        return timing.CudaTimer().peak_bytes(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class FixedLogits(nn.Module):
    """In the place of a model: logits that cost nothing, so that all a step does is its own part."""

    def __init__(self, classes: int, dtype: torch.dtype):
        super().__init__()
        self.classes, self.dtype, self.by_rows = classes, dtype, {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.by_rows:
            logits = torch.randn(len(x), self.classes, dtype=self.dtype, device=x.device)
            self.by_rows[len(x)] = logits.requires_grad_()
        logits = self.by_rows[len(x)]
        logits.grad = None
        return logits


class Bench:
    """The contenders of one model in one mode: ``"eager"``, ``"compile"`` or, on a GPU, ``"graph"``.

    They share model, optimizer and batch: with an optimizer and a batch of its own, the one that runs most often finds them
    in the caches, and a second eager Mixup on LeNet came out at 1.02.
    """

    def __init__(self, spec: Spec, batch: int, device: str, mode: str):
        torch.manual_seed(0)
        random.seed(0)
        self.spec, self.batch, self.device, self.mode = spec, batch, device, mode
        self.model = spec.model().to(device)
        if len(spec.shape) == 3 and device == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        options = {"capturable": True} if mode == "graph" else {}
        self.optimizer = spec.optimizer(self.model.parameters(), **options)
        self.x, self.labels = self.data(batch)

    def data(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch, bf16 channels_last on a GPU."""
        x = torch.randn(batch, *self.spec.shape, device=self.device)
        if self.device == "cuda" and x.dim() == 4:
            x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        return x, torch.randint(self.spec.classes, (batch,), device=self.device)

    def contender(self, method: Method, x: Tensor, labels: Tensor) -> Callable[[], None]:
        """``method.steps`` steps, warmed up and compiled or captured as the mode asks. Some mix in the memory of ``x``."""
        objective = torch.compile(method.objective) if self.mode == "compile" else method.objective
        mixed_precision = self.mixed_precision()

        def call() -> None:
            for _ in range(method.steps):
                inputs = method.prepare(x, labels)
                self.optimizer.zero_grad(set_to_none=True)
                with mixed_precision:
                    loss = objective(*inputs)
                loss.backward()
                self.optimizer.step()

        call()
        if self.mode == "graph":
            call = timing.CudaTimer().capture([call], torch.cuda.graph_pool_handle())
        return self.finished(call)

    def mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def finished(self, call: Callable[[], object]) -> Callable[[], None]:
        """``call``, and on a GPU the wait for its end."""
        if self.device != "cuda":
            return call

        def wait() -> None:
            call()
            torch.cuda.synchronize()

        return wait

    def own_parts(self, names: Collection[str], mean: Tensor, rounds: int) -> dict[str, float]:
        """Median seconds of the ways' batch, loss and backward of the loss, in eager mode."""
        if self.mode != "eager":
            return {}
        mixed_precision = self.mixed_precision()
        with mixed_precision, torch.no_grad():
            logits = self.model(self.x)
        methods = make_methods(FixedLogits(self.spec.classes, logits.dtype), self.spec.classes, self.batch, mean)

        def part(method: Method) -> None:
            for _ in range(method.steps):
                inputs = method.prepare(self.x, self.labels)
                with mixed_precision:
                    loss = method.objective(*inputs)
                loss.backward()

        calls = {
            name: self.finished(functools.partial(part, method))
            for name, method in methods.items()
            if name in names and method.extra_rows is not None
        }
        times = timing.interleave(calls, rounds, min_seconds=TURN_SECONDS)
        return {name: statistics.median(seconds) / methods[name].steps for name, seconds in times.items()}

    def run(self, rounds: int, quick: bool, missing: Callable[[str, Exception], None]) -> list[StepRow]:
        """Time all contenders; one that raises is reported to ``missing`` and left out."""
        mean = torch.zeros(self.spec.shape, device=self.device)
        methods = make_methods(self.model, self.spec.classes, self.batch, mean)
        if quick:
            methods = {name: method for name, method in methods.items() if name not in FULL_RUN_ONLY}
        calls, peaks = {}, {}
        for name, method in methods.items():
            try:
                calls[name] = self.contender(method, self.x, self.labels)
                peaks[name] = peak_bytes(self.model, calls[name], self.device)
            except Exception as error:  # noqa: BLE001, a model without a forward-mode formula, a step that cannot be captured
                missing(name, error)
                calls.pop(name, None)
        twice = self.contender(methods["Mixup"], *self.data(2 * self.batch))
        # On its own, because a step of twice the memory leaves the heap in another state for the one after it.
        pair = timing.interleave({"Mixup": calls["Mixup"], "twice": twice}, rounds, warmup=1, min_seconds=1e-2)
        share = timing.ratio(pair["twice"], pair["Mixup"]).median - 1
        more_turns = {} if quick else TURNS_A_ROUND
        pairs = timing.interleave_with(BASE, calls, rounds, min_seconds=TURN_SECONDS, turns_a_round=more_turns)
        own_parts = self.own_parts(calls, mean, min(rounds, MOST_OWN_ROUNDS))
        shares = {name: [own / base for own, base in zip(*pair, strict=True)] for name, pair in pairs.items()}
        rows = []
        for name, pair in pairs.items():
            method = methods[name]
            seconds = [value / method.steps for value in pair.seconds]
            ratio = timing.ratio(seconds, pair.base)
            own = timing.ratio(shares[name], shares["Mixup"]).median / method.steps
            rows.append(
                StepRow(
                    self.spec.name,
                    self.device,
                    self.mode,
                    self.batch,
                    name,
                    timing.quartiles(seconds)[1],
                    *ratio,
                    ratio.standard_error(rounds),
                    own,
                    max(ratio.median, own) <= TARGET_RATIO,
                    own_parts.get(name),
                    peaks[name],
                    share,
                    None if method.extra_rows is None else 1 + method.extra_rows * share,
                )
            )
        return rows


class StepBar(NamedTuple):
    """A ratio of two ways' times on one model and mode, its standard error where known, and what it may be at most."""

    model: str
    what: str
    measured: float
    error: float | None
    limit: float

    @property
    def verdict(self) -> str:
        """By the measured median, and whether two standard errors would turn it."""
        verdict = "[green]met[/]" if self.measured <= self.limit else "[red]not met[/]"
        close = self.error is not None and abs(self.measured - self.limit) < 2 * self.error
        return f"{verdict}, within error" if close else verdict


def bars(rows: list[StepRow]) -> list[StepBar]:
    """Each bar this benchmark is held to, on one model and mode."""
    by_name = {row.method: row for row in rows}
    name = f"{rows[0].model}, {rows[0].mode}"
    limits = [("Mixup", 1.0), ("MixupE sample 1/8", TARGET_RATIO), ("MixupE split 1/4", 1.05), ("MixupE split 1/8", 1.05),
              ("MixupE mixed", 1.05)]  # fmt: skip
    found = [
        StepBar(name, f"{row.method} / {BASE}", row.ratio, row.ratio_error, limit)
        for row, limit in ((by_name.get(method), limit) for method, limit in limits)
        if row
    ]
    ours, eager = by_name["Mixup"], by_name[BASE]
    if ours.own_seconds:
        found.append(StepBar(name, f"own part of Mixup / of {BASE}", ours.own_seconds / eager.own_seconds, None, 1.0))
    full, form = by_name["MixupE full"], by_name["MixupE, authors' form"]
    return [*found, StepBar(name, "MixupE full / authors' form", full.ratio / form.ratio, None, 1.0)]


def show(console: Console, rows: list[StepRow]) -> None:
    """The table of one model in one mode."""
    first = rows[0]
    title = f"{first.model}, batch {first.batch}, {first.device}, {first.mode}; u = {first.share:.2f}"
    table = Table(title=title, box=box.SIMPLE)
    headers = ("", "ms", "/ Mixup eager", "quartiles", "/ Mixup", f"≤ {TARGET_RATIO}×", "1 + ρu", "own ms", "peak MiB")
    for header in headers:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method, f"{1e3 * row.seconds:.2f}", f"{row.ratio:.2f}", f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
            f"{row.ratio_ours:.2f}", "[green]met[/]" if row.target_met else "[red]not met[/]",
            "" if row.prediction is None else f"{row.prediction:.2f}",
            "" if row.own_seconds is None else f"{1e3 * row.own_seconds:.2f}", f"{row.peak_bytes / 2**20:.1f}",
        )  # fmt: skip
    console.print(table)


# mallopt(3): never mmap a buffer of its own, hand nothing back below 16 GiB. Elsewhere than on glibc it does nothing.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


def keep_memory() -> None:
    """Restart this process with ``KEEP_MEMORY``, which malloc reads when a process starts, unless it has it."""
    if any(name not in os.environ for name in KEEP_MEMORY):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**KEEP_MEMORY, **os.environ})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer ways and rounds: 3 minutes on 2 cores")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "compile", "graph"), help="default: all on a GPU, else eager"
    )
    parser.add_argument("--out", type=Path, help="where results go (default bench/results/step-DEVICE)")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        keep_memory()
    out = options.out or results.RESULTS / f"step-{options.device}"
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows, held = [], []
    for spec in SPECS:
        if options.only not in spec.name or (spec.needs_gpu and options.device == "cpu"):
            continue
        rounds = max(3, spec.rounds // 2) if options.quick else spec.rounds
        for mode in options.modes or (("eager", "compile", "graph") if options.device == "cuda" else ("eager",)):
            with console.status(f"{spec.name}, {mode}"):
                bench = Bench(spec, spec.batch, options.device, mode)
                new = bench.run(
                    rounds, options.quick, lambda name, error: console.print(f"{name}: left out: {error!r}"[:300])
                )
            show(console, new)
            rows, held = rows + new, held + bars(new)
    results.write_csv(out / "rows.csv", rows, StepRow)
    facts = results.machine_facts()
    facts["backend"] = backends.serving(options.device)
    if options.device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    training_plots.step(out / "rows.csv", out / "step.png", f"{facts['device']}, torch {facts['torch']}")
    table = Table("model", "bar", "measured", "at most", "", title="Bars", box=box.SIMPLE)
    for bar in held:
        error = "" if bar.error is None else f" ± {bar.error:.3f}"
        table.add_row(bar.model, bar.what, f"{bar.measured:.3f}{error}", f"{bar.limit:g}", bar.verdict)
    console.print(table)
    lines = [f"{name}: {value}" for name, value in facts.items()]
    console.print("; ".join(lines), soft_wrap=True, highlight=False)
    console.print(f"Results and picture: {out}", soft_wrap=True, highlight=False)
    return 0
