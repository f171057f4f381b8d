"""Train for a long time while everything goes wrong that may, and see that nothing stays of it.

    python -m tests.soak --steps 20000 --ranks 4 --seed 0
    python -m tests.soak --steps 1000 --seed 1 --json soak.json

A run is a sequence of lives. In each, a group of ranks with a wire of its own trains on from the last checkpoint, until
it is told to stop or one of its ranks crashes; then all others must end with an error, and the next life begins. In
every step faults are drawn from `soak_plan.FAULTS`. All of it follows from the seed: the same one gives the same
faults, and what fails at step 1234 fails there again.

Checked at every step: all ranks have the same parameters, bit for bit, and finite ones; a step with a gradient that is
not finite is skipped, and one without a fault is not; the hook has counted each synchronised backward pass, and bytes
whenever there was one; the loss stays about or below that of the start. Steps that are taken again, after a move to a
new DDP model with other buckets or after a crash, have the same bits. What `GROWTH` lists stays as it is over the
second half of each life, but for what a move takes at once: torch's new process group has threads and pools of its own.
"""

import itertools
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from tqdm import tqdm

from launch.cli import run_command
from tests.ranks import _context
from tests.soak_plan import FAULTS, Life, Soak, lives, plan
from tests.soak_rank import Crashed, Failed, Observed, rank_main

LOSS_STEPS = 100
"""A loss is the mean of so many steps."""
LOSS_BOUND = 1.2
"""In units of the first loss."""
GRACE = 30.0
"""Seconds beyond the group's timeout: for processes to start and to end, on a busy machine."""

SETTLE = 100
"""Steps after a move in which pools fill again."""


class Growth(NamedTuple):
    """How much the line may rise that is fitted to the second half of a life."""

    per_1000_steps: float
    noise: float
    """What it may rise in all, however short the life is."""
    warm_up: int
    """First steps of the life that are not looked at."""


GROWTH = {
    "resident KiB": Growth(256.0, 1024.0, warm_up=250),  # the allocator's pools fill
    "objects": Growth(10.0, 100.0, warm_up=10),
    "tensors": Growth(1.0, 20.0, warm_up=10),
    "threads": Growth(0.5, 2.0, warm_up=10),
    "open files": Growth(0.5, 2.0, warm_up=10),
}


class SoakError(AssertionError):
    """What was wrong, on one line: the step, its faults, the life, how to see it again."""


class Watch:
    """Compares what the ranks tell, and keeps the figures."""

    def __init__(self, soak: Soak, on_step: Callable[[int, float], object] = lambda number, loss: None) -> None:
        self.soak = soak
        self.life: Life | None = None
        self._on_step = on_step
        self._start = time.monotonic()
        self._counts = {"taken": 0, "taken again": 0, "skipped": 0, "predicted": 0}
        self._faults: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._seconds_to_end: dict[str, float] = {}
        self._slopes: dict[str, float] = {}
        self._losses: dict[int, float] = {}
        self._digests: dict[int, str] = {}

    def begin(self, life: Life) -> None:
        """Another life begins."""
        # In the very first step the network sums floats in an order that depends on the buckets
        same = self.life is not None and life.start > 0 and life.has_the_bits_of(self.life)
        self.life, self._earlier, self._digests = life, self._digests if same else {}, {}
        self._last: dict[int, Observed] = {}
        self._waiting: dict[int, dict[int, Observed]] = defaultdict(dict)
        self._usage: dict[int, dict[int, dict[str, int]]] = defaultdict(dict)

    def see(self, rank: int, seen: Observed) -> None:
        """One rank has completed a step."""
        before = self._last.get(rank)
        self._last[rank] = seen
        if not seen.finite:
            raise self.error(seen.step, f"parameters of rank {rank} are not finite")
        if seen.hook_step != seen.backwards:
            what = f"state.step of rank {rank} is {seen.hook_step} after {seen.backwards} backward passes"
            raise self.error(seen.step, what)
        if before is not None and (seen.wire_bytes > before.wire_bytes) != (seen.backwards > before.backwards):
            what = f"wire_bytes of rank {rank} were {before.wire_bytes} and are {seen.wire_bytes}"
            raise self.error(seen.step, f"{what}, backward passes {before.backwards} and {seen.backwards}")
        if seen.usage is not None:
            self._usage[rank][seen.step] = seen.usage
        assert self.life is not None
        ranks = self._waiting[seen.step]
        ranks[rank] = seen
        if len(ranks) == self.life.world_size:
            del self._waiting[seen.step]
            self._see_all([ranks[rank] for rank in sorted(ranks)])

    def _see_all(self, ranks: list[Observed]) -> None:
        """All ranks have completed a step."""
        assert self.life is not None
        first, number = ranks[0], ranks[0].step
        step = plan(self.soak, self.life, number)
        if any(seen.digest != first.digest for seen in ranks):
            raise self.error(number, f"parameters differ between ranks: {[seen.digest[:8] for seen in ranks]}")
        if any(seen.predicted != first.predicted for seen in ranks):
            raise self.error(number, f"only some ranks predicted: {[seen.predicted for seen in ranks]}")
        if step.overflows and not (first.predicted or step.inputs or first.skipped):
            raise self.error(number, "a gradient was not finite, and the optimizer made its step")
        if first.skipped and not step.faults:
            raise self.error(number, "nothing was wrong, and the optimizer made no step")
        if self._earlier.get(number, first.digest) != first.digest:
            raise self.error(number, "a step after a crash has other bits than before it")
        self._digests[number] = first.digest
        self._losses[number] = statistics.fmean(seen.loss for seen in ranks if seen.loss is not None)
        loss = self._mean_loss(number)
        if not loss <= LOSS_BOUND * self._first_loss():
            raise self.error(number, f"the loss was {self._first_loss():.3g} and is {loss:.3g}")
        self._faults.update([] if first.predicted else step.faults)
        found = {"taken": 1, "taken again": number in self._earlier, "skipped": first.skipped}
        for name, count in {**found, "predicted": first.predicted}.items():
            self._counts[name] += count
        self._on_step(number, loss)

    def end(self, seconds: float | None) -> None:
        """The life is over; its last rank ended so many seconds after one had crashed."""
        assert self.life is not None
        kind = self.life.crash or "told to stop"
        self._ends[kind] += 1
        if seconds is not None:
            self._seconds_to_end[kind] = max(seconds, self._seconds_to_end.get(kind, 0.0))
        for rank, samples in self._usage.items():
            moves = [n for n in range(self.life.start, max(samples) + 1) if plan(self.soak, self.life, n).move]
            settled = {n: usage for n, usage in samples.items() if not any(m <= n < m + SETTLE for m in moves)}
            for name, limit in GROWTH.items():
                warm = {n: usage[name] for n, usage in settled.items() if n >= self.life.start + limit.warm_up}
                slope, rise = fitted_rise(warm, moves)
                self._slopes[name] = max(slope, self._slopes.get(name, -math.inf))
                if slope > limit.per_1000_steps and rise > limit.noise:
                    what = f"{name} of rank {rank} rose by {rise:.0f} in the life's second half"
                    raise self.error(max(samples), f"{what}, {slope:.1f} per 1000 steps")

    def error(self, number: int, what: str) -> SoakError:
        """What is wrong in a step, and where that is."""
        assert self.life is not None
        faults = ", ".join(plan(self.soak, self.life, number).faults) or "no fault"
        return SoakError(f"step {number} ({faults}; {self.life}): {what}. Seed {self.soak.seed}.")

    def _mean_loss(self, number: int) -> float:
        return statistics.fmean(self._losses[n] for n in range(max(0, number + 1 - LOSS_STEPS), number + 1))

    def _first_loss(self) -> float:
        return self._mean_loss(min(LOSS_STEPS, len(self._losses)) - 1)

    def summary(self) -> dict[str, Any]:
        """The figures so far."""
        return {
            **asdict(self.soak),
            **self._counts,
            "faults": {name: self._faults[name] for name in FAULTS},
            "ends": dict(self._ends),
            "seconds to end after": self._seconds_to_end,
            "rise per 1000 steps": self._slopes,
            "first loss": self._first_loss(),
            "last loss": self._mean_loss(max(self._losses)),
            "seconds": time.monotonic() - self._start,
        }


def fitted_rise(samples: dict[int, int], moves: Sequence[int] = ()) -> tuple[float, float]:
    """Of lines of one slope through the later half of samples by step, one line between two moves: per 1000 steps and
    in all; zeros if they are too few."""
    later = list(samples.items())[len(samples) // 2 :]
    if len(later) < 10:
        return 0.0, 0.0
    lines = [list(line) for _, line in itertools.groupby(later, lambda item: bisect_right(moves, item[0]))]
    x, y = [], []
    for line in lines:
        middle, level = (statistics.fmean(values) for values in zip(*line, strict=True))
        x += [step - middle for step, _ in line]
        y += [value - level for _, value in line]
    slope = statistics.linear_regression(x, y, proportional=True).slope if any(x) else 0.0
    return 1000 * slope, slope * sum(line[-1][0] - line[0][0] for line in lines)


class Group:
    """The processes of a life."""

    def __init__(self, soak: Soak, life: Life, folder: Path) -> None:
        self.soak, self.life, self.folder = soak, life, folder
        self._pipes, self._processes = {}, []
        self._failures: dict[int, Failed] = {}
        self._crashed_at: float | None = None
        for rank in range(life.world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=rank_main, args=(soak, life, rank, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes[ours] = rank
            self._processes.append(process)

    def run(self, watch: Watch) -> float | None:
        """Pass on what the ranks tell until all have ended, as they should. Returns how long it took after a crash.

        Raises: SoakError.
        """
        patience = self.soak.timeout + GRACE
        deadline = time.monotonic() + patience
        number = self.life.start
        try:
            while self._pipes:
                ready = wait(list(self._pipes), max(0.0, deadline - time.monotonic()))
                if not ready:
                    self._show_stacks()
                    raise watch.error(number, f"ranks {sorted(self._pipes.values())} hang for {patience:.0f} seconds")
                for pipe in ready:
                    seen = self._receive(pipe)
                    if seen is not None:
                        watch.see(self._pipes[pipe], seen)
                        number, deadline = seen.step, time.monotonic() + patience
            seconds = None if self._crashed_at is None else time.monotonic() - self._crashed_at
            self._check_end(watch, number)
            return seconds
        except SoakError:
            for log in sorted(self.folder.glob(f"{self.life.number}.*.log")):
                print(f"{log.name}:\n{log.read_text(errors='replace')}", file=sys.stderr)
            raise
        finally:
            for process in self._processes:
                process.kill()
                process.join()
                process.close()

    def _receive(self, pipe: Any) -> Observed | None:
        try:
            message = pipe.recv()
        except EOFError:  # its process has ended
            del self._pipes[pipe]
            return None
        if isinstance(message, Failed):
            self._failures[self._pipes[pipe]] = message
        if isinstance(message, Crashed):
            self._crashed_at = time.monotonic()
            if self.life.crash == "stall":
                del self._pipes[pipe]
        return message if isinstance(message, Observed) else None

    def _check_end(self, watch: Watch, number: int) -> None:
        crashed = set() if self._crashed_at is None else {self.life.crash_rank}
        for rank in set(range(self.life.world_size)) - crashed:
            process, failure = self._processes[rank], self._failures.get(rank)
            process.join(GRACE)
            if process.exitcode != (0 if failure is None else 1):
                raise watch.error(number, f"rank {rank} ended with exit code {process.exitcode}")
            if crashed and (failure is None or not failure.is_runtime_error):
                text = "without an error" if failure is None else f"with {failure.text}"
                raise watch.error(number, f"rank {rank} ended {text} after rank {self.life.crash_rank} had crashed")
        if self._failures and not crashed:
            rank, failure = min(self._failures.items(), key=lambda item: item[1].at)
            raise watch.error(failure.step, f"rank {rank} raised {failure.text}")
        if self.life.crash and not crashed:
            raise watch.error(number, f"rank {self.life.crash_rank} did not crash")

    def _show_stacks(self) -> None:
        for rank in self._pipes.values():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(1.0)


def run_soak(soak: Soak, on_step: Callable[[int, float], object] = lambda number, loss: None) -> dict[str, Any]:
    """All lives, one after the other. Returns the figures. Raises: SoakError."""
    watch = Watch(soak, on_step)
    with tempfile.TemporaryDirectory() as folder:
        for life in lives(soak):
            watch.begin(life)
            watch.end(Group(soak, life, Path(folder)).run(watch))
    return watch.summary()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = Soak.steps,
    ranks: Annotated[int, typer.Option(min=2, help="The most that a life has; the least is two.")] = Soak.ranks,
    seed: Annotated[int, typer.Option(min=0, help="Decides every fault.")] = Soak.seed,
    timeout: Annotated[float, typer.Option(min=1, help="Of the process groups, in seconds.")] = Soak.timeout,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> int:
    """Train while everything goes wrong that may, and see that nothing stays of it."""
    soak = Soak(steps=steps, ranks=ranks, seed=seed, timeout=timeout)
    with tqdm(total=steps, unit="step", smoothing=0.01) as bar:

        def show(number: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)
            bar.update(max(0, number + 1 - bar.n))  # a step that is taken again is no progress

        try:
            figures = run_soak(soak, show)
        except SoakError as error:
            bar.close()
            print(f"error: {error}", file=sys.stderr)
            return 1
    for name, value in figures.items():
        shown = json.dumps(value) if isinstance(value, dict) else value
        print(f"{name:>22}  {shown}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
