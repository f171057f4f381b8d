"""One rank of a soak test: a process that trains, does what is planned and tells what it sees. See `tests.soak`."""

import faulthandler
import gc
import io
import logging
import os
import signal
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import digest, net
from tests.soak_plan import Branched, Life, Soak, Step, ddp_options, plan

LR = 1e-3 * vsa_ddp.learning_rate_factor(bundle=4)
PHASES = {"warmup_steps": 5, "full_steps": 3, "predict_steps": 4, "correct_every": 2, "decay": 0.5}
MAX_SCALE = 2.0**16
"""Of the loss: growing further, it would overflow by itself."""
AHEAD = 3
"""Steps that are taken before a move and again after it."""


class Observed(NamedTuple):
    """What a rank tells of a step that it has completed."""

    step: int
    loss: float | None
    """Mean over its batches, if it had any."""
    digest: str
    """Of the parameters."""
    finite: bool
    """The parameters."""
    skipped: bool
    """Whether they are those of the step before."""
    predicted: bool
    hook_step: int
    backwards: int
    """Synchronised backward passes, by its own count."""
    wire_bytes: int
    usage: dict[str, int] | None
    """What the process holds; not in every step."""


class Crashed(NamedTuple):
    """The last thing that a rank tells before it crashes as planned."""


class Failed(NamedTuple):
    """The last thing that a rank tells that raised an exception."""

    step: int
    at: float
    is_runtime_error: bool
    """What a rank should raise that misses another."""
    text: str


def rank_main(soak: Soak, life: Life, rank: int, folder: Path, pipe: Connection) -> None:
    """A process from its beginning to its end."""
    _set_up(folder / f"{life.number}.{rank}.log")
    code, number = 0, life.start
    try:
        for number in _live(soak, life, rank, folder, pipe):  # noqa: B007  (told if it raises)
            pass
        dist.barrier()
    except BaseException as error:
        logging.exception("step %d", number)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        pipe.send(Failed(number, time.monotonic(), isinstance(error, RuntimeError), text))
        code = 1
    os._exit(code)  # gloo sometimes aborts in the interpreter's own teardown


def _set_up(log: Path) -> None:
    """What the process has to say goes into a file, its stacks too on SIGUSR1."""
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.register(signal.SIGUSR1)
    warnings.simplefilter("ignore")  # DDP's, that no parameter is unused
    logging.getLogger("vsa_ddp").setLevel(logging.ERROR)  # its warnings that a life has other settings than the last
    gc.collect()
    gc.freeze()  # what was imported is not counted any more


def _live(soak: Soak, life: Life, rank: int, folder: Path, pipe: Connection) -> Iterator[int]:
    """Train from the last checkpoint on. Yields the number of each step before it."""
    checkpoint = folder / "checkpoint.pt"
    options = ddp_options(Random(f"life {life.number} of {soak.seed}"))

    def join_group(name: str) -> None:
        timeout = timedelta(seconds=soak.timeout)
        store = f"file://{folder}/{life.number}.{name}.store"
        dist.init_process_group("gloo", store, timeout, life.world_size, rank)

    join_group("start")
    run = Run(soak, life, rank, options, checkpoint.read_bytes() if life.start else None)
    assert run.step == life.start, f"the checkpoint is of step {run.step}, and this life begins at {life.start}"
    expected: dict[int, str] = {}
    for number in range(life.start, life.end + (soak.life_steps if life.crash else 0)):
        yield number
        step = plan(soak, life, number)
        if number == life.end and rank == life.crash_rank:
            run.crash_in_backward(life, pipe)
        if step.move is not None:
            saved, old = run.save(), weakref.ref(run.state)
            # what the old one would do, to compare the new one with
            expected |= {n: run.take(plan(soak, life, n)).digest for n in range(number, number + AHEAD)}
            dist.barrier()
            dist.destroy_process_group()
            del run
            gc.collect()
            assert old() is None, "the old model's state outlives it"
            join_group(str(number))
            run = Run(soak, life, rank, step.move, saved)
        seen = run.take(step)
        assert expected.pop(number, seen.digest) == seen.digest, "a step after a move has other bits than without it"
        pipe.send(seen)
        ends = life.crash is None and run.step == life.end
        if rank == 0 and number < life.end and (ends or run.step % soak.checkpoint_every == 0):
            partial = checkpoint.with_suffix(".partial")
            partial.write_bytes(run.save())
            partial.rename(checkpoint)


class Run:
    """A model and all that trains it, from the start of a life, or a move, to the next."""

    def __init__(self, soak: Soak, life: Life, rank: int, options: dict[str, Any], saved: bytes | None) -> None:
        self.soak, self.rank, self.step, self.backwards = soak, rank, 0, 0
        torch.manual_seed(soak.seed)
        self.model = DDP(Branched(), find_unused_parameters=life.find_unused, **options)
        self.teacher = net(soak.seed + 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=16)
        self.state = vsa_ddp.register(self.model, self.optimizer, **life.settings)
        self.parts = {
            "model": self.model.module,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "hook": self.state,
        }
        self.phases: vsa_ddp.PhasedTrainer | None = None
        if life.adapt is not None:
            config = vsa_ddp.PhaseConfig(adapt=life.adapt, **PHASES)
            self.phases = vsa_ddp.PhasedTrainer(self.model, self.optimizer, config, scaler=self.scaler)
            self.parts["phases"] = self.phases
        if saved is not None:
            self._load(torch.load(io.BytesIO(saved), weights_only=True))
        self.digest = digest(self.model.parameters())

    def save(self) -> bytes:
        file = io.BytesIO()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({**states, "step": self.step, "backwards": self.backwards}, file)
        return file.getvalue()

    def _load(self, saved: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            if name in saved:  # the life before may have had no phases
                part.load_state_dict(saved[name])
        self.step, self.backwards = saved["step"], saved["backwards"]

    def crash_in_backward(self, life: Life, pipe: Connection) -> None:
        """From now on. If this step has no backward pass, in the next one that has."""

        def crash(gradient: Tensor) -> Tensor:
            pipe.send(Crashed())
            if life.crash != "raise":
                os.kill(os.getpid(), signal.SIGKILL if life.crash == "kill" else signal.SIGSTOP)
            raise ValueError("a planned crash")

        dict(self.model.module.named_parameters())[life.crash_parameter].register_hook(crash)

    def take(self, step: Step) -> Observed:
        """Take one step, with all that is planned for it."""
        handles = [
            parameter.register_hook(spoil.change)
            for spoil in step.spoils
            for name, parameter in self.model.module.named_parameters()
            if spoil.rank in (None, self.rank) and spoil.parameter in (None, name)
        ]
        losses, predicted = self._train(step) if step.inputs is None else self._join(step, step.inputs)
        for handle in handles:
            handle.remove()
        self.step += 1
        before, self.digest = self.digest, digest(self.model.parameters())
        return Observed(
            step=step.number,
            loss=statistics.fmean(losses) if losses else None,
            digest=self.digest,
            finite=all(bool(p.isfinite().all()) for p in self.model.parameters()),
            skipped=self.digest == before,
            predicted=predicted,
            hook_step=self.state.step,
            backwards=self.backwards,
            wire_bytes=self.state.compression_stats().wire_bytes,
            usage=usage() if self.step % self.soak.measure_every == 0 else None,
        )

    def _train(self, step: Step, index: int = 0) -> tuple[list[float], bool]:
        """One optimizer step. Returns the losses of its micro-batches, and whether its gradient was predicted."""
        losses = []
        with self._optimizer_step() as (backward, predicted):
            for _ in range(step.idle_forwards):
                self._loss(step, index, 0)
            for micro in range(step.micro_batches):
                is_last = micro == step.micro_batches - 1
                with nullcontext() if is_last else self.model.no_sync():
                    loss = self._loss(step, index, micro)
                    backward(loss / step.micro_batches)
                losses.append(loss.item())
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update(MAX_SCALE if self.scaler.get_scale() > MAX_SCALE else None)
        if not predicted:
            # DDP takes a forward pass outside of `no_sync` for the promise of a backward pass that sends
            self.backwards += 2 if step.idle_forwards and step.micro_batches > 1 else 1
        return losses, predicted

    @contextmanager
    def _optimizer_step(self) -> Iterator[tuple[Callable[[Tensor], None], bool]]:
        """Gives what to call for backward, and whether it will predict."""
        if self.phases is None:
            self.optimizer.zero_grad()
            yield lambda loss: self.scaler.scale(loss).backward(), False
        else:
            with self.phases.step() as step:
                yield step.backward, step.predicted

    def _join(self, step: Step, inputs: list[int]) -> tuple[list[float], bool]:
        """As many optimizer steps as this rank has inputs; then all are made equal to the rank that had most."""
        losses: list[float] = []
        before = self.backwards
        with self.model.join():
            for index in range(inputs[self.rank]):
                losses += self._train(step, index)[0]
        self.backwards = before + max(inputs)  # on a rank that has joined DDP calls the hook, too
        # DDP has sent the parameters, and leaves the rest to the user
        rest = [self.optimizer.state_dict(), self.scaler.state_dict()]
        dist.broadcast_object_list(rest, src=inputs.index(max(inputs)))
        self.optimizer.load_state_dict(rest[0])
        self.scaler.load_state_dict(rest[1])
        return losses, False

    def _loss(self, step: Step, index: int, micro: int) -> Tensor:
        name = f"batch {index} {micro} of rank {self.rank} in step {step.number} of {self.soak.seed}"
        generator = torch.Generator().manual_seed(Random(name).getrandbits(63))
        x = torch.randn(step.sizes[self.rank], 4, 16, generator=generator)
        with torch.no_grad():
            target = self.teacher(x)
        return (self.model(x, *step.branches[self.rank]) - target).square().mean()


def usage() -> dict[str, int]:
    """What this process holds now."""
    gc.collect()
    objects = gc.get_objects()
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())  # shared with files: code
    return {
        "resident KiB": (resident - shared) * os.sysconf("SC_PAGE_SIZE") // 1024,
        "objects": len(objects),
        "tensors": sum(issubclass(type(thing), Tensor) for thing in objects),
        "threads": len(os.listdir("/proc/self/task")),
        "open files": len(os.listdir("/proc/self/fd")),
    }
