"""A plan's state: saved and loaded with a run, and given back where a call fails."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .. import checks
from .plan import Plan
from .progress import MAX_WORKERS


def state_dict(plan: Plan) -> dict[str, Any]:
    return {
        "epoch": plan.epoch,
        "steps": plan.progress.steps,
        "worker_steps": plan.progress.worker_steps,
        "enabled": plan.enabled,
        "generator": None if plan.generator is None else plan.generator.get_state(),
    }


def load_state_dict(plan: Plan, state: Mapping[str, Any]) -> None:
    """Check all of ``state``, then take it.

    Raises:
        TypeError, ValueError: if it is not what ``state_dict`` returns; the plan is as it was then.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() returned, got {type(state).__name__}")
    missing = {"epoch", "steps", "enabled", "generator"} - set(state)
    if missing:
        raise ValueError(f"state must have all entries of state_dict(), {sorted(missing)} are missing")
    epoch = checks.non_negative("state['epoch']", state["epoch"])
    enabled = checks.boolean("state['enabled']", state["enabled"])
    worker_steps = state.get("worker_steps", [])
    if not isinstance(worker_steps, (list, tuple)) or len(worker_steps) > MAX_WORKERS:
        raise TypeError(f"state['worker_steps'] must be a list of at most {MAX_WORKERS} ints, got {worker_steps!r}")
    worker_steps = [checks.integer("state['worker_steps']", steps, 0) for steps in worker_steps]
    steps = checks.integer("state['steps']", state["steps"], sum(worker_steps))
    generator, saved = plan.generator, state["generator"]
    if generator is None or saved is None:
        if generator is not saved:
            has = "none" if generator is None else "one"
            raise ValueError(f"generator must be given where the saved one had one, and only there; this has {has}")
        plan.set_epoch(epoch)
    else:
        checks.dtype("state['generator']", checks.tensor("state['generator']", saved), (torch.uint8,))
        before = generator.get_state()
        try:
            generator.set_state(saved.cpu())
        except RuntimeError as error:
            raise ValueError(f"state['generator'] must be a generator's state: {error}") from None
        try:
            plan.set_epoch(epoch)
        except BaseException:  # a ramp's own
            generator.set_state(before)
            raise
    plan.set_enabled(enabled)
    plan.progress.set_steps(steps, worker_steps)


@contextmanager
def restored_on_error(plan: Plan, device: torch.device) -> Iterator[None]:
    """Random states and counts as they were, if what is done within raises."""
    generators = [torch.default_generator] if plan.generator is None else [torch.default_generator, plan.generator]
    states = [generator.get_state() for generator in generators]
    on_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" and plan.generator is None else None
    drawn, phase = float(plan.progress.own), plan.progress.phase
    try:
        yield
    except BaseException:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if on_cuda is not None:
            torch.cuda.set_rng_state(on_cuda, device)
        plan.progress.own.fill_(drawn)
        plan.progress.phase = phase
        raise
