"""``python -m bench step``: the time of a whole training step, per model and way to train, over a Mixup step's.

A step is the batch, forward, loss, backward and optimizer, on a batch that lies on the device. All ways take turns round
by round in one process, each between two turns of eager Mixup, and a ratio is the median of the turns' ratios to these.
A step's own part, the batch, the loss and the loss's backward, is timed within it. Mixup "eager" is timm's: the flip
pairing, in place, dense soft targets, ``SoftTargetCrossEntropy``. The 1.3× target is met where the step costs at most 1.3×
of both eager Mixup's and our own, which has every optimization that ours has.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixupe_kernels.ops import backends

from . import models, results, step_plot, timing
from .methods import POLICIES, TARGET_RATIO
from .step_methods import BASE, Method, make_methods

# Mostly the steady state of training: in turns of 10 ms the first steps after another contender's weighed in.
TURN_SECONDS = 5e-2
FULL_RUN_ONLY = (
    *(POLICIES[name].label for name in ("sample 1/4", "sample 1/16", "split 1/8", "interval")),
    "MixupE exact q",
)
QUICK_BATCH = 32
# Where a bar compares two steps that are nearly alike, a turn a round does not tell them apart.
TURNS_A_ROUND = {"Mixup": 15, "MixupE full": 3, "MixupE, authors' form": 3}


@dataclasses.dataclass
class StepRow:
    """One way to train one model. ``seconds`` is the median time of a step; ``ratio``, to eager Mixup, has its quartiles and
    its standard error. ``ratio_ours`` is over that of our own Mixup.

    ``own_seconds`` is what the batch, the loss and the loss's backward take of it: the rest is the same for every way with
    as many rows. None in modes other than eager, and where the loss differentiates the model.
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
    Spec("MLP 64-128-128-10", lambda: models.mlp(64, 10), (64,), 10, 100, _adam, 61),
    Spec("LeNet 1x160x101", models.lenet, (1, 160, 101), 30, 100, _adam, 15),
    Spec("PreActResNet-18 3x32x32", models.preact_resnet18, (3, 32, 32), 100, 100, _sgd, 5),
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


class OwnParts:
    """The seconds of each call that its steps' own part takes, by the name of the way to train.

    Hooks of the model mark where the batch ends, the loss begins, and the gradient of the logits is there. Timed without
    the model they would find the caches as they left them: 0.26 instead of 1.1 ms for Mixup beside PreActResNet-18.
    """

    def __init__(self, model: nn.Module, device: str, mode: str):
        self.device, self.watches = device, mode == "eager"
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._marks: list[float | torch.cuda.Event] = []
        if self.watches:
            model.register_forward_pre_hook(self.mark)
            model.register_forward_hook(self._after_forward)

    def mark(self, *_) -> None:
        """The begin or the end of a stretch of a step's own part: there is one before and one after the model."""
        if not self.watches:
            return
        if self.device == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def _after_forward(self, model: nn.Module, inputs: tuple, logits: Tensor) -> None:
        self.mark()
        if logits.requires_grad:
            logits.register_hook(self._at_gradient)

    def _at_gradient(self, gradient: Tensor) -> None:
        # With two calls of the model, the loss is over at the first gradient: the other comes after a backward of the model.
        if len(self._marks) % 2:
            self.mark()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the steps of one call; on a GPU they have to be over when it ends."""
        self._marks.clear()
        yield
        parts = zip(self._marks[::2], self._marks[1::2], strict=False)  # exact q may mark an odd number of times
        self.seconds[name].append(
            sum(begin.elapsed_time(end) / 1e3 if self.device == "cuda" else end - begin for begin, end in parts)
        )


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
        self.own_parts = OwnParts(self.model, device, mode)

    def data(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch, bf16 channels_last on a GPU."""
        x = torch.randn(batch, *self.spec.shape, device=self.device)
        if self.device == "cuda" and x.dim() == 4:
            x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        return x, torch.randint(self.spec.classes, (batch,), device=self.device)

    def contender(self, name: str, method: Method, x: Tensor, labels: Tensor) -> Callable[[], None]:
        """``method.steps`` steps, warmed up and compiled or captured as the mode asks. Some mix in the memory of ``x``."""
        objective = torch.compile(method.objective) if self.mode == "compile" else method.objective
        mixed_precision = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

        def steps() -> None:
            for _ in range(method.steps):
                self.optimizer.zero_grad(set_to_none=True)
                self.own_parts.mark()
                inputs = method.prepare(x, labels)
                with mixed_precision:
                    loss = objective(*inputs)
                loss.backward()
                self.optimizer.step()

        steps()
        if self.mode == "graph":
            steps = timing.CudaTimer().capture([steps], torch.cuda.graph_pool_handle())

        def call() -> None:
            with self.own_parts.of(name):
                steps()
                if self.device == "cuda":
                    torch.cuda.synchronize()

        return call

    def run(self, rounds: int, quick: bool, missing: Callable[[str, Exception], None]) -> list[StepRow]:
        """Time all contenders; one that raises is reported to ``missing`` and left out."""
        mean = torch.zeros(self.spec.shape, device=self.device)
        methods = make_methods(self.model, self.spec.classes, self.batch, mean)
        if quick:
            methods = {name: method for name, method in methods.items() if name not in FULL_RUN_ONLY}
        calls, peaks = {}, {}
        for name, method in methods.items():
            try:
                calls[name] = self.contender(name, method, self.x, self.labels)
                peaks[name] = peak_bytes(self.model, calls[name], self.device)
            except Exception as error:  # noqa: BLE001, a model without a forward-mode formula, a step that cannot be captured
                missing(name, error)
                calls.pop(name, None)
        twice = self.contender("twice", methods["Mixup"], *self.data(2 * self.batch))
        # On its own, because a step of twice the memory leaves the heap in another state for the one after it.
        pair = timing.interleave({"Mixup": calls["Mixup"], "twice": twice}, rounds, warmup=0, min_seconds=1e-2)
        share = timing.ratio(pair["twice"], pair["Mixup"]).median - 1
        self.own_parts.seconds.clear()  # those of calls that warmed up
        turns = {"warmup": 0, "min_seconds": TURN_SECONDS, "turns_a_round": {} if quick else TURNS_A_ROUND}
        pairs = timing.interleave_with(BASE, calls, rounds, **turns)
        # One figure a step: a call may be of several.
        times = {
            name: timing.Pairs([value / methods[name].steps for value in pair.seconds], pair.base)
            for name, pair in pairs.items()
        }
        ours = timing.ratio(*times["Mixup"]).median
        rows = []
        for name, pair in times.items():
            method, ratio = methods[name], timing.ratio(*pair)
            own = self.own_parts.watches and method.extra_rows is not None
            rows.append(
                StepRow(
                    self.spec.name,
                    self.device,
                    self.mode,
                    self.batch,
                    name,
                    timing.quartiles(pair.seconds)[1],
                    *ratio,
                    ratio.standard_error(len(pair.seconds)),
                    ratio.median / ours,
                    max(ratio.median, ratio.median / ours) <= TARGET_RATIO,
                    statistics.median(self.own_parts.seconds[name]) / method.steps if own else None,
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
    def missed(self) -> bool:
        """Beyond two standard errors, where these are known."""
        return self.measured > self.limit and not self.close

    @property
    def close(self) -> bool:
        """Whether two standard errors would turn the verdict."""
        return self.error is not None and abs(self.measured - self.limit) < 2 * self.error

    @property
    def verdict(self) -> str:
        """By the measured median, and whether two standard errors would turn it."""
        verdict = "[green]met[/]" if self.measured <= self.limit else "[red]not met[/]"
        return f"{verdict}, within error" if self.close else verdict


def bars(rows: list[StepRow]) -> list[StepBar]:
    """Each bar this benchmark is held to, on one model and mode."""
    by_name = {row.method: row for row in rows}
    name = f"{rows[0].model}, {rows[0].mode}"
    limits = [("Mixup", 1.0), ("MixupE sample 1/8", TARGET_RATIO), ("MixupE split 1/4", 1.05), ("MixupE split 1/8", 1.05),
              ("MixupE mixed", 1.05)]  # fmt: skip
    found = [StepBar(name, f"{row.method} / {BASE}", row.ratio, row.ratio_error, limit)
             for row, limit in ((by_name.get(method), limit) for method, limit in limits) if row]  # fmt: skip
    ours, eager = by_name["Mixup"], by_name[BASE]
    if ours.own_seconds:
        found.append(StepBar(name, f"own part of Mixup / of {BASE}", ours.own_seconds / eager.own_seconds, None, 1.0))
    full, form = by_name["MixupE full"], by_name["MixupE, authors' form"]
    ratio = full.ratio / form.ratio
    error = ratio * math.hypot(full.ratio_error / full.ratio, form.ratio_error / form.ratio)
    return [*found, StepBar(name, "MixupE full / authors' form", ratio, error, 1.0)]


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
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"fewer ways and rounds, batches of {QUICK_BATCH}: under 3 minutes on 2 cores",
    )
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "compile", "graph"), help="default: all on a GPU, else eager"
    )
    parser.add_argument("--out", type=Path, help="where results go (default bench/results/step-DEVICE)")
    parser.add_argument("--no-bars", action="store_true", help="exit with 0 whatever the bars say")
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
        rounds, batch = (max(3, spec.rounds // 4), QUICK_BATCH) if options.quick else (spec.rounds, spec.batch)
        for mode in options.modes or (("eager", "compile", "graph") if options.device == "cuda" else ("eager",)):
            with console.status(f"{spec.name}, {mode}"):
                bench = Bench(spec, batch, options.device, mode)
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
    step_plot.step(out / "rows.csv", out / "step.png", f"{facts['device']}, torch {facts['torch']}")
    table = Table("model", "bar", "measured", "at most", "", title="Bars", box=box.SIMPLE)
    for bar in held:
        error = "" if bar.error is None or math.isnan(bar.error) else f" ± {bar.error:.3f}"
        table.add_row(bar.model, bar.what, f"{bar.measured:.3f}{error}", f"{bar.limit:g}", bar.verdict)
    console.print(table)
    lines = [f"{name}: {value}" for name, value in facts.items()]
    console.print("; ".join(lines), soft_wrap=True, highlight=False)
    console.print(f"Results and picture: {out}", soft_wrap=True, highlight=False)
    return 0 if options.no_bars or not any(bar.missed for bar in held) else 1
