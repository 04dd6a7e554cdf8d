"""`python -m bench ranks`: what the loss on several ranks sends, counted under gloo, and what that costs at 8 to 1024 GPUs.

Counted: messages and bytes of each rank, by the kernel's count of the writes of its process (/proc/self/io), on 2 to 8 processes
of this machine, beside what the model says. Modelled: seconds at scale, from the assumptions below, which no GPU has measured.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mixupe_kernels as mk

from .results import RESULTS, read_csv, write_csv

FOLDER = RESULTS / "ranks"
REPEATS = 20
ROWS, CLASSES = 64, 96  # of what is counted; 96 is divided by 2, 3, 4 and 8
SAMPLE = (3, 8, 8)  # float32


@dataclass
class Count:
    """What one call sends, as a mean over the ranks: messages, and bytes with gloo's headers."""

    call: str
    ranks: int
    collectives: int
    payload_bytes: int  # of one rank, in one call
    messages: float
    messages_most: float  # by the model: gloo sends fewer where a payload has no 16 bytes for each part of a ring
    bytes: float
    bytes_modelled: float


@dataclass
class Cost:
    """What a call costs at scale: ``seconds`` in which the collective runs, of which the step waits for ``exposed_seconds``."""

    call: str
    ranks: int
    payload_bytes: int
    seconds: float
    exposed_seconds: float
    step_seconds: float
    exposed_share: float


# Gloo over TCP: each transfer is a message with the data and one from each side to say that it is ready, of 48 bytes each
# beside the data. An all-reduce is a ring in two halves, an all-gather a ring in two halves, an all-to-all one transfer to each.
HEADER, MESSAGES = 48, 3


def transfers(collective: str, ranks: int, payload: int) -> tuple[int, float]:
    """(transfers of each rank, bytes of data that it sends) of a collective, ``payload`` being the bytes of one rank."""
    others = ranks - 1
    return {
        "all_reduce": (4 * others, 2 * others / ranks * payload),
        "all_gather": (2 * others, others * payload),
        "all_to_all": (others, others / ranks * payload),
    }[collective]


# At scale, assumed and not measured: nodes of 8 GPUs.
LAUNCH = 15e-6  # seconds from a collective's call to its first message, and back to the stream
WITHIN, BETWEEN = 1.5e-6, 6e-6  # seconds a hop, by NVLink and by the network
BYTES_WITHIN, BYTES_BETWEEN = 300e9, 40e9  # bytes a second of one GPU
PER_NODE = 8
# A step of (256, 3, 224, 224) images on one GPU, a ResNet-50 in bfloat16, and one of a small network whose kernels are short.
STEPS = {"ResNet-50, 256 images": 0.1, "a small CNN": 0.005}
BACKWARD = 2 / 3  # of a step: what an all-reduce that is under way during the backward has to hide behind


def seconds(collective: str, ranks: int, payload: int) -> float:
    """Of a tree for an all-reduce, whose payload is small, of rings for the others."""
    nodes = math.ceil(ranks / PER_NODE)
    within = min(ranks, PER_NODE)
    slow = BYTES_BETWEEN if nodes > 1 else BYTES_WITHIN
    sent = transfers(collective, ranks, payload)[1]
    if collective == "all_reduce":
        hops = 2 * (math.log2(within) * WITHIN + math.ceil(math.log2(nodes)) * BETWEEN)
    else:
        hops = (ranks - nodes) * WITHIN + (nodes if nodes > 1 else 0) * BETWEEN
    return LAUNCH + hops + sent / slow


@dataclass
class Case:
    """A call, its collectives with the bytes of one rank, and whether the step waits for them."""

    name: str
    collectives: Callable[[int], list[tuple[str, int]]]
    exposed: bool
    run: Callable[[], Callable[[], object]]


def _target(rows: int, classes: int) -> mk.MixedTarget:
    labels = torch.arange(rows) % classes
    return mk.MixedTarget(labels, labels.flip(0), torch.full((rows,), 0.5), rows - 8, 8, 0.3)


def _loss():
    criterion = mk.MixupELoss(process_group=dist.group.WORLD)
    logits, target = torch.randn(ROWS, CLASSES, requires_grad=True), _target(ROWS, CLASSES)
    return lambda: criterion(logits, target).backward()


def _step():
    criterion = mk.MixupELoss()
    logits, target = torch.randn(ROWS, CLASSES, requires_grad=True), _target(ROWS, CLASSES)

    def run():
        step = mk.StepRows([target], process_group=dist.group.WORLD)
        criterion(logits, target, step=step).backward()
        step.finish()

    return run


def _classes():
    criterion = mk.MixupELoss(class_shards=mk.ClassShards(CLASSES))
    own = CLASSES // dist.get_world_size()
    logits, target = torch.randn(ROWS, own, requires_grad=True), _target(ROWS, CLASSES)
    return lambda: criterion(logits, target).backward()


def _partners():
    mixer = mk.Mixup(pairing="across_ranks", seed=0)
    x, labels = torch.randn(ROWS, *SAMPLE), torch.arange(ROWS)
    return lambda: mixer(x, labels)


def _bytes_of_a_sample() -> int:
    return 4 * math.prod(SAMPLE) + 16  # the label, on 16 bytes


CASES = [
    Case("loss of all rows", lambda rows: [("all_reduce", 48)], True, _loss),
    Case("the same by StepRows", lambda rows: [("all_reduce", 24)] * 2, False, _step),
    Case("loss of divided classes", lambda rows: [("all_gather", 16 * rows)], True, _classes),
    Case("partners across ranks", lambda rows: [("all_to_all", rows * _bytes_of_a_sample())], True, _partners),
]


def _written() -> tuple[int, int]:
    """(messages, bytes) that this process has written, to sockets and files."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["syscw"]), int(told["wchar"])


def sent(run: Callable[[], object]) -> torch.Tensor:
    """(messages, bytes) of a call, as a mean over the ranks, which all count at once."""
    run()  # connections are made
    dist.barrier()
    time.sleep(0.1)  # what gloo's threads still send
    before = _written()
    for _ in range(REPEATS):
        run()
    time.sleep(0.2)
    written = torch.tensor([new - old for new, old in zip(_written(), before, strict=True)], dtype=torch.float64)
    dist.all_reduce(written)
    return written / (REPEATS * dist.get_world_size())


def counts() -> list[Count]:
    """Each case on the ranks of the process group."""
    found, ranks = [], dist.get_world_size()
    for case in CASES:
        messages, total = sent(case.run()).tolist()
        payloads = case.collectives(ROWS)
        made = [transfers(name, ranks, size) for name, size in payloads]
        # The headers are of the messages that were counted, so that the bytes beside them are compared with the payloads'.
        modelled = sum(data for _, data in made) + HEADER * messages
        most = MESSAGES * sum(number for number, _ in made)
        size = sum(size for _, size in payloads)
        found.append(Count(case.name, ranks, len(payloads), size, messages, most, total, modelled))
    return found


def as_modelled(count: Count) -> bool:
    """Whose samples are whose partners is drawn, so that a rank sends (R - 1) / R of them on average only."""
    return abs(count.bytes - count.bytes_modelled) <= 0.03 * count.bytes and count.messages <= count.messages_most


def _work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = counts()
    if rank == 0:
        write_csv(Path(folder, "counts.csv"), found, Count)
    dist.barrier()
    dist.destroy_process_group()


def count(ranks: int) -> list[Count]:
    """The same on so many new processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, args=(ranks, folder), nprocs=ranks, start_method="spawn")
        return read_csv(Path(folder, "counts.csv"), Count)


def costs() -> list[Cost]:
    """Every case on 8 to 1024 GPUs, of 256 rows each (64 for partners across ranks, of 3·224·224 bytes)."""
    made = []
    for case in CASES:
        for ranks in (8, 16, 64, 256, 1024):
            for step in STEPS.values():
                payloads = case.collectives(256)
                if case.run is _partners:
                    payloads = [("all_to_all", 64 * (3 * 224 * 224 + 16))]
                time_of = sum(seconds(name, ranks, size) for name, size in payloads)
                exposed = time_of if case.exposed else max(0.0, time_of - BACKWARD * step)
                total = sum(size for _, size in payloads)
                made.append(Cost(case.name, ranks, total, time_of, exposed, step, exposed / step))
    return made


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench ranks", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8], help="processes to count on")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args(arguments)
    if not os.path.exists("/proc/self/io"):
        parser.error("messages are counted by /proc/self/io, which this system does not have")
    given.out.mkdir(parents=True, exist_ok=True)
    found = []
    for ranks in given.ranks:
        found += count(ranks)
        for line in found[-len(CASES) :]:
            print(
                f"{line.call:24} {ranks} ranks: {line.messages:6.1f} messages (at most {line.messages_most:g}), "
                f"{line.bytes:9.0f} bytes (model {line.bytes_modelled:9.0f})",
                flush=True,
            )
    write_csv(given.out / "counts.csv", found, Count)
    write_csv(given.out / "costs.csv", costs(), Cost)
    wrong = [line for line in found if not as_modelled(line)]
    for line in wrong:
        print(f"not as modelled: {line}")
    return 1 if wrong else 0
