"""One rank under torchrun: `launch.train.train` on a tiny model, and faults at exact places, one in each attempt.

    torchrun --standalone --nproc-per-node=2 --max-restarts=1 -m tests.elastic_worker FOLDER killed_in_backward

FOLDER gets the checkpoint, `worlds` (the world size of each attempt), `happened` (a line for each fault that has) and
`figures.json`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from launch import train
from launch.checkpoint import Checkpoint
from launch.train import TrainConfig
from vsa_ddp.wires import link

CONFIG = TrainConfig(steps=12, batch=2, length=32, width=32, num_layers=1, num_heads=2)
CHECKPOINT_EVERY = 4


def happen(folder: Path) -> None:
    with (folder / "happened").open("a") as file:
        file.write("now\n")


def num_happened(folder: Path) -> int:
    file = folder / "happened"
    return len(file.read_text().splitlines()) if file.exists() else 0


def die(folder: Path) -> None:
    happen(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_backward(model: DDP, folder: Path) -> None:
    if dist.get_rank() == 1:
        model.module.blocks[0].qkv.weight.register_hook(lambda gradient: die(folder))


def killed_in_the_collective(model: DDP, folder: Path) -> None:
    """Rank 1 dies when rank 0 has handed over its packet and waits for rank 1's."""
    all_gather = link._all_gather

    def wait_or_die(*arguments: Any, **options: Any) -> dist.Work:
        if dist.get_rank() == 1:
            while not (folder / "handed_over").exists():
                time.sleep(0.01)
            die(folder)
        work = all_gather(*arguments, **options)
        (folder / "handed_over").touch()
        return work

    link._all_gather = wait_or_die


def killed_in_the_checkpoint(model: DDP, folder: Path) -> None:
    """Rank 0 dies when half of the partial file is written."""
    save = torch.save

    def save_half(state: object, file: Path) -> None:
        save(state, file)
        os.truncate(file, file.stat().st_size // 2)
        die(folder)

    torch.save = save_half


def raises(model: DDP, folder: Path) -> None:
    def fail(gradient: torch.Tensor) -> None:
        happen(folder)
        raise ArithmeticError("the fault of rank 1")

    if dist.get_rank() == 1:
        model.module.blocks[0].qkv.weight.register_hook(fail)


def waits_for_another_node(model: DDP, folder: Path) -> None:
    """Alone, train no further: torchrun ends this rank when a node joins."""
    if dist.get_world_size() == 1:
        time.sleep(600)


def is_lost_with_its_node(model: DDP, folder: Path) -> None:
    """torchrun, which is the node, and then its only rank."""
    os.kill(os.getppid(), signal.SIGKILL)
    die(folder)


Fault = Callable[[DDP, Path], None]

# What befalls a run, and in which step. In the first, nothing is compressed; the second checkpoint is that of step 8
FAULTS: dict[str, tuple[int, Fault]] = {
    "killed_in_backward": (6, killed_in_backward),
    "killed_in_the_collective": (6, killed_in_the_collective),
    "killed_in_the_checkpoint": (7, killed_in_the_checkpoint),
    "raises": (6, raises),
    "waits_for_another_node": (6, waits_for_another_node),
    "is_lost_with_its_node": (10, is_lost_with_its_node),
}


def inject(faults: list[str], folder: Path) -> None:
    """From now on the first fault that has not happened comes in its step."""
    take_step = train.take_step
    number = num_happened(folder)
    if number == len(faults):
        return
    at_step, befall = FAULTS[faults[number]]

    def take_faulty_step(model: DDP, optimizer: torch.optim.Optimizer, *arguments: Any) -> tuple[float, bool]:
        steps_done = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        if steps_done == at_step:
            befall(model, folder)
        return take_step(model, optimizer, *arguments)

    train.take_step = take_faulty_step


def main(folder: Path, faults: list[str]) -> None:
    checkpoint = Checkpoint(folder=folder, every=CHECKPOINT_EVERY)
    train.check_checkpoint(checkpoint, CONFIG)
    dist.init_process_group("metered", timeout=timedelta(minutes=2))
    if dist.get_rank() == 0:
        with (folder / "worlds").open("a") as worlds:
            worlds.write(f"{dist.get_world_size()}\n")
    inject(faults, folder)
    figures = train.train(CONFIG, checkpoint)
    if figures is not None:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts in the interpreter's own teardown


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
