"""Run a function as every rank of a gloo group, each in a process of its own, and collect what they return."""

import multiprocessing
import os
import pickle
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Children come from a clean server process: forking pytest itself would copy torch's threads half dead.
# DDP's constructor imports torch._dynamo, 0.7 s in each child if it is not there already
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch._dynamo", "vsa_ddp", "tests.models", "tests.warm"])


class RankFailedError(AssertionError):
    """A rank raised, died or did not finish in time."""


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, seconds: float = 60, backend: str = "gloo"
) -> list[Any]:
    """`[function(rank, world_size, *args) for each rank]`, with the default group initialised, one thread per rank.

    The first rank that fails ends the others, and its traceback is raised here. `function` is a module's own function.
    """
    run = folder / uuid.uuid4().hex
    run.mkdir()
    ranks = [
        _context.Process(target=_rank_main, args=(function, rank, world_size, run, args, seconds, backend), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    failure = None
    while failure is None and any(process.is_alive() for process in ranks):
        if time.monotonic() > deadline:
            failure = f"not finished after {seconds} s: ranks {[r for r, p in enumerate(ranks) if p.is_alive()]}"
        elif bad := [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0)]:
            failure = f"rank {bad[0]} exited with {ranks[bad[0]].exitcode}"
        time.sleep(0.005)
    for process in ranks:
        if failure:
            process.kill()
        process.join()
    results = []
    for rank in range(world_size):
        outcome = run / f"{rank}.pickle"
        if not outcome.exists():
            continue
        ok, value = pickle.loads(outcome.read_bytes())
        if not ok:
            raise RankFailedError(f"rank {rank}:\n{value}")
        results.append(value)
    if failure or len(results) < world_size:
        raise RankFailedError(failure or f"only {len(results)} of {world_size} ranks left a result")
    return results


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    run: Path,
    args: tuple[Any, ...],
    seconds: float,
    backend: str,
) -> None:
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{run}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        outcome = True, function(rank, world_size, *args)
        dist.barrier()
    except BaseException:
        outcome = False, traceback.format_exc()
        code = 1
    partial = run / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(run / f"{rank}.pickle")
    os._exit(code)  # gloo sometimes aborts in the interpreter's own teardown
