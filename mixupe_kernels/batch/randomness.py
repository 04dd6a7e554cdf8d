"""Random numbers from a caller's generator, or from torch's default for the device, in eager code and in compiled graphs.

A graph takes no generator: torch's functions lose the symbolic size where one is named, even None, and torch.compile refuses
an object. There a :class:`Stream` stands for the generator, and an operator that knows it by number draws from it.
"""

import hashlib
import itertools
import os
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from .. import checks
from ..conventions import OLD_COMPILER


class Stream:
    """A caller's generator, which several mixers may share: one of these for each generator, whoever asks.

    It pickles by value, which torch.Generator does not do on its way to a spawned process.

    Attributes:
        key: the number that graphs know it by.
        ticket: (1,) int64, which each draw of a graph advances, so that the compiler neither merges nor reorders draws.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.in_worker = False
        self.key = next(_keys)
        self.ticket = torch.zeros(1, dtype=torch.int64, device="cpu")
        _by_key[self.key] = self

    @staticmethod
    def of(generator: torch.Generator) -> "Stream":
        stream = _by_generator.get(id(generator))
        if stream is None:
            stream = _by_generator[id(generator)] = Stream(generator)
        return stream

    def enter_worker(self) -> None:
        """Go on as a stream of the data loader's worker that this process is, whose seed differs from epoch to epoch.

        The new seed is made of both, since torch's default generator has the worker's own.
        """
        worker = get_worker_info()
        if worker is not None and not self.in_worker:
            self.generator.manual_seed(hash((self.generator.initial_seed(), worker.seed)) % 2**63)
            self.in_worker = True

    def __reduce__(self) -> tuple:
        return _restored, (str(self.generator.device), bytes(self.generator.get_state().tolist()))


def _restored(device: str, state: bytes) -> Stream:
    generator = torch.Generator(device)
    generator.set_state(torch.tensor(list(state), dtype=torch.uint8, device="cpu"))
    return Stream.of(generator)


def rank_and_ranks() -> tuple[int, int]:
    """This process's rank, and how many there are: of the process group, or before it is made as torchrun says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Seeds:
    """What a mixer's draws begin with: a base seed, with the rank, unless all are to draw the same, and the epoch mixed in.

    Attributes:
        place: (rank, number of ranks) as the epoch began.
    """

    def __init__(self, seed: int, same: bool):
        self.seed, self.same = seed, same
        self.epoch, self.place = 0, rank_and_ranks()

    @staticmethod
    def of(seed: int | None, same: bool, generator: torch.Generator | None) -> "Seeds | None":
        """Of a mixer's arguments; None without a seed."""
        checks.boolean("same_draws", same)
        if seed is None:
            if same:
                raise ValueError("seed must be given with same_draws, got None")
            return None
        seed = checks.integer("seed", seed)
        if generator is not None:
            raise ValueError(f"generator must be None with seed, got {generator!r}")
        return Seeds(seed, same)

    def enter(self, epoch: int) -> bool:
        """Whether ``epoch`` is another than the last one said."""
        changed = epoch != self.epoch
        self.epoch = epoch
        if changed and get_worker_info() is None:  # a worker is of no process group
            self.place = rank_and_ranks()
        return changed

    def of_draws(self, *more: int) -> int:
        return self._mixed("draws", 0 if self.same else self.place[0], self.epoch, *more)

    def of_partners(self, step: int) -> int:
        """The same on every rank."""
        return self._mixed("partners", self.epoch, step)

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.of_draws())

    def _mixed(self, *parts: int | str) -> int:
        """63 bits that depend on every part: of neighbouring seeds and ranks, too, streams have nothing in common."""
        digest = hashlib.blake2b(repr((self.seed, *parts)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


_keys = itertools.count()
_by_generator: WeakValueDictionary[int, Stream] = WeakValueDictionary()
_by_key: WeakValueDictionary[int, Stream] = WeakValueDictionary()
Source = torch.Generator | Stream | None


_DEFAULT, _default_ticket = -1, torch.zeros(1, dtype=torch.int64, device="cpu")  # of torch's own generators
_HAVE_GAMMA = ("cpu", "cuda", "meta")  # others have Gamma variates drawn on the CPU


def standard_gamma(concentration: Tensor, source: Source) -> Tensor:
    """Gamma(a, 1) for each a. By a private function of torch, since torch.distributions takes no generator."""
    if isinstance(source, Stream) or (source is None and OLD_COMPILER and torch.compiler.is_compiling()):
        ticket, key = (_default_ticket, _DEFAULT) if source is None else (source.ticket, source.key)
        size, dtype, device = concentration.shape, concentration.dtype, concentration.device
        return from_stream(ticket, key, "standard_gamma", size, dtype, device, concentration)
    device = concentration.device
    if device.type in _HAVE_GAMMA:
        return torch._standard_gamma(concentration, generator=source)
    generator = None
    if source is not None:
        seed = torch.randint(2**31 - 1, (), device=device, generator=source)
        generator = torch.Generator().manual_seed(int(seed))
    return torch._standard_gamma(concentration.cpu(), generator=generator).to(device)


@torch.library.custom_op("mixupe::from_stream", mutates_args=("ticket",))
def from_stream(
    ticket: Tensor,
    key: int,
    law: str,
    size: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    concentration: Tensor | None = None,
) -> Tensor:
    ticket += 1
    generator = None if key == _DEFAULT else _by_key[key].generator
    if concentration is not None:
        return standard_gamma(concentration, generator)
    if law == "randperm":
        return torch.randperm(size[0], device=device, generator=generator)
    return torch.rand(size, dtype=dtype, device=device, generator=generator)


@from_stream.register_fake
def _(ticket, key, law, size, dtype, device, concentration=None):
    return torch.empty(size, dtype=dtype, device=device)
