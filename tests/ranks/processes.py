"""Processes under gloo for tests: each runs the same cases, in the same order, and says how each went.

Starting a process that imports torch takes seconds, so all cases of a file share the processes. A rank that fails ends all.
"""

import importlib
import os
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds, for all cases


def run(cases: list[str], ranks: int, folder: Path, timeout: float = TIMEOUT) -> dict[str, str]:
    """Call the cases, "module:function" each, on each of so many ranks; case → "passed", an error, or why it was not reached."""
    store = folder / f"store-{ranks}"
    context = mp.start_processes(
        _work, args=(cases, ranks, str(store), str(folder)), nprocs=ranks, join=False, start_method="spawn"
    )
    deadline, why = time.monotonic() + timeout, "an earlier case failed"
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                why = f"no answer within {timeout:g} seconds"
                break
    except mp.ProcessRaisedException:
        pass  # the case's own verdict has the error
    except mp.ProcessExitedException as error:
        why = str(error)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return {case: _verdict(folder, case, ranks, why) for case in cases}


def _verdict(folder: Path, case: str, ranks: int, why: str) -> str:
    said = [folder / f"{case}-{ranks}-{rank}" for rank in range(ranks)]
    failed = [path.read_text() for path in said if path.exists() and path.read_text()]
    return "\n".join(failed) or ("passed" if all(path.exists() for path in said) else why)


def _work(rank: int, cases: list[str], ranks: int, store: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for case in cases:
        torch.manual_seed(0)
        error = ""
        try:
            module, name = case.split(":")
            getattr(importlib.import_module(module), name)()
        except BaseException:
            error = f"rank {rank}:\n{traceback.format_exc()}"
            raise
        finally:
            Path(folder, f"{case}-{ranks}-{rank}").write_text(error)
    dist.barrier()
    dist.destroy_process_group()


def cases_of(*modules: str) -> list[str]:
    """The functions of modules whose names begin with ``case_``, in their order."""
    found = {module: vars(importlib.import_module(module)) for module in modules}
    return [f"{module}:{name}" for module, names in found.items() for name in names if name.startswith("case_")]
