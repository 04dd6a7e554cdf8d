"""Where training is: the epoch, whether batches are mixed at all, and how many were; said once for all of a run's processes."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

MAX_WORKERS = 1024
ONE = torch.ones(1, dtype=torch.float64, device="cpu")  # what a batch adds to ``Progress.own``
_EPOCH, _ENABLED, _STEPS = 0, 1, 2  # what the shared numbers are; a worker's count follows at _STEPS + 1 + its id


class _Phase:
    """One of the ``interval`` batches of a round; whether it is the one that is regularized."""

    __slots__ = ("due", "next")
    due: bool
    next: _Phase


def _ring(interval: int, position: int) -> _Phase:
    """The phase that comes before ``position`` + 1 of a round.

    A compiled caller follows a reference where it would read a number: the compiler makes a graph for each value of a number
    that it reads, and so one for due phases and one for all others.
    """
    phases = [_Phase() for _ in range(interval)]
    for number, phase in enumerate(phases):
        phase.due = number == 0
        phase.next = phases[(number + 1) % interval]
    return phases[position % interval]


class Progress:
    """The epoch, ``enabled`` and the batches drawn, in memory that a data loader's workers share with the main process.

    A worker has a copy of the mixer, made by fork or by pickling, and keeps it for all epochs where workers are persistent.
    The copy reads epoch and ``enabled`` from the shared memory, and is the only one to write its worker's count.

    Attributes:
        own: (1,) float64, batches drawn in this process. Whoever draws one adds 1, and goes to the next ``phase``.
        phase: where in a round of ``interval`` batches the main process is.
    """

    def __init__(self, interval: int):
        self.interval = interval
        self._numbers = torch.zeros(_STEPS + 1 + MAX_WORKERS, dtype=torch.float64, device="cpu")
        self._numbers[_ENABLED] = 1
        self.own = self._numbers[_STEPS : _STEPS + 1]
        self._worker: int | None = None
        self._workers = 1
        self.phase = _ring(interval, 0)
        self._share()

    def _share(self) -> None:
        if not self._numbers.is_shared():
            try:
                self._numbers.share_memory_()
            except RuntimeError:  # no shared memory on this machine: a data loader's workers cannot send batches either
                return
            self.own = self._numbers[_STEPS : _STEPS + 1]

    def __getstate__(self) -> dict:
        return {"interval": self.interval, "numbers": self._numbers}

    def __setstate__(self, state: dict) -> None:
        self.interval, self._numbers = state["interval"], state["numbers"]
        self.own, self._worker, self._workers = self._numbers[_STEPS : _STEPS + 1], None, 1
        self._share()
        self.phase = _ring(self.interval, self.steps)

    @property
    def epoch(self) -> float:
        return float(self._numbers[_EPOCH])

    @epoch.setter
    def epoch(self, value: float) -> None:
        self._numbers[_EPOCH] = value

    @property
    def enabled(self) -> bool:
        return bool(self._numbers[_ENABLED])

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._numbers[_ENABLED] = value

    @property
    def steps(self) -> int:
        """Batches drawn, those of all workers among them."""
        return int(self._numbers[_STEPS:].sum())

    @property
    def worker_steps(self) -> list[int]:
        """Batches that each worker drew, up to the last one that drew any."""
        counts = self._numbers[_STEPS + 1 :].long()
        return counts[: int(counts.nonzero().max()) + 1].tolist() if bool(counts.any()) else []

    def set_steps(self, steps: int, worker_steps: list[int]) -> None:
        """Continue after ``steps`` batches, ``worker_steps`` of them drawn by each worker."""
        self._numbers[_STEPS:] = 0
        self._numbers[_STEPS + 1 : _STEPS + 1 + len(worker_steps)] = torch.tensor(worker_steps, dtype=torch.float64)
        self._numbers[_STEPS] = steps - sum(worker_steps)
        self.phase = _ring(self.interval, steps)

    @property
    def in_worker(self) -> bool:
        return self._worker is not None

    def due(self) -> bool:
        """Whether the next batch is the last of its round of ``interval`` batches, which is regularized.

        Workers count rounds of their own, at different places: each regularizes every ``interval``-th of its batches, which
        makes one in ``interval`` of all batches.
        """
        if self._worker is None:
            return self.phase.next.due
        return (int(self.own) + 1 + self._worker * self.interval // self._workers) % self.interval == 0

    def enter_worker(self) -> None:
        """Count as the data loader's worker that this process is.

        Raises:
            ValueError: if the data loader has more workers than there are counts for.
        """
        info = get_worker_info()
        if info is None:
            return
        if info.id >= MAX_WORKERS:
            raise ValueError(
                f"num_workers must be at most {MAX_WORKERS} with a mixer in a worker, got {info.num_workers}"
            )
        self._worker, self._workers = info.id, info.num_workers
        self.own = self._numbers[_STEPS + 1 + info.id :][:1]
