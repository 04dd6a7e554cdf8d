"""A plan's state: saved and loaded with a run, and given back where a call fails."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .. import checks
from .plan import Plan
from .progress import MAX_WORKERS
from .randomness import rank_and_ranks


def state_dict(plan: Plan) -> dict[str, Any]:
    ranks: dict[str, Any] = {}
    if plan.generator is not None:
        ranks["ranks"] = rank_and_ranks() if plan.seeds is None else plan.seeds.place
        if plan.seeds is not None:
            ranks |= {"seed": plan.seeds.seed, "device": str(plan.generator.device)}
    return {
        **ranks,
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
    fresh = _check_ranks(plan, state)
    if generator is None or saved is None:
        if generator is not saved:
            has = "none" if generator is None else "one"
            raise ValueError(f"generator must be given where the saved one had one, and only there; this has {has}")
        plan.set_epoch(epoch)
    elif plan.seeds is not None and fresh:
        plan.set_epoch(epoch)
        plan.reseed(plan.seeds.of_draws(state["ranks"][1], steps))
    else:
        checks.dtype("state['generator']", checks.tensor("state['generator']", saved), (torch.uint8,))
        if plan.seeds is not None and str(generator.device) != state["device"]:
            generator = plan.begin_on(torch.device(state["device"]), plan.seeds)
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
        if plan.seeds is not None:  # another epoch has begun a stream of its own
            generator.set_state(saved.cpu())
    plan.set_enabled(enabled)
    plan.progress.set_steps(steps, worker_steps)


def _check_ranks(plan: Plan, state: Mapping[str, Any]) -> bool:
    """Whether the state's draws are another rank's, or another number's of ranks: a seed then goes on with fresh ones."""
    if plan.generator is None or state["generator"] is None:
        return False
    seed = None if plan.seeds is None else plan.seeds.seed
    if seed != state.get("seed"):
        raise ValueError(f"seed must be {state.get('seed')}, as of the saved mixer, got {seed}")
    place = state.get("ranks", rank_and_ranks())
    if not isinstance(place, (tuple, list)) or len(place) != 2:
        raise TypeError(f"state['ranks'] must be a rank and the number of ranks, got {place!r}")
    rank, ranks = (checks.integer("state['ranks']", number, 0) for number in place)
    if plan.seeds is not None:
        return (rank, ranks) != plan.seeds.place
    if ranks != rank_and_ranks()[1]:
        raise ValueError(
            f"state must be of as many ranks, {rank_and_ranks()[1]}, got one of {ranks}: the draws of a generator cannot go "
            "on with others, those of a seed can"
        )
    return False


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
