"""Long benchmarks: what they are asked for, and runs in several processes at a time, planned anew as each ends."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

import typer
from tqdm import tqdm

from benchmarks.store import Record, Store

Trial = TypeVar("Trial")


def check_options(quick: bool, full: bool, rebuild: bool, wanted: Iterable[str], suites: Collection[str]) -> None:
    """Raises: typer.BadParameter unless one of the three is asked for, and suites that there are."""
    if quick + full + rebuild != 1:
        raise typer.BadParameter("choose one of --quick, --full and --report.")
    check_names(wanted, suites)


def check_names(wanted: Iterable[str], known: Collection[str]) -> None:
    """Raises: typer.BadParameter for one that does not exist."""
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}; choose from {', '.join(known)}.")


def work(
    store: Store,
    plan: Callable[[list[Record]], list[Trial]],
    run: Callable[[Trial], Record],
    label: Callable[[Trial], str],
    jobs: int,
    seconds: float,
) -> None:
    """Run what `plan` makes of the runs so far, until nothing is left or the time is up."""
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with, initargs=(os.getpid(),))
    with pool, tqdm(unit="run", initial=len(store.list)) as bar:
        running: dict[Future[Record], Trial] = {}
        while True:
            planned = [t for t in plan(store.list) if t not in running.values()]
            if time.monotonic() < deadline:
                for trial in planned[: jobs - len(running)]:
                    running[pool.submit(run, trial)] = trial
            if not running:
                break
            bar.total = len(store.list) + len(running) + len(planned)
            bar.set_postfix_str("; ".join(map(label, running.values())))
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                store.add(done.result())
                del running[done]
                bar.update()


def _end_with(parent: int) -> None:
    """Stop this process once its parent is gone: what it would find then, nobody stores."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
