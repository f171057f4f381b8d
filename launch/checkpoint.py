"""What a training run needs to go on after a restart: a file for all ranks, and where they differ one of each rank's
own, in a folder that every host sees."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Stateful(Protocol):
    """A part of a run that can be saved: model, optimizer, hook state and the like."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where and how often a run is saved. Rank 0 writes what all ranks share, and every rank reads it."""

    folder: Path
    every: int
    """Steps."""

    @property
    def file(self) -> Path:
        return self.folder / "checkpoint.pt"

    def check(self, config: dict[str, Any]) -> None:
        """Make the folder if it is not there.

        Raises: ValueError if it holds a run of other settings; OSError.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = self._read()
        if saved is not None and saved["config"] != config:
            differ = [name for name in config if saved["config"].get(name) != config[name]]
            raise ValueError(f"{self.file} is a run with another {', '.join(differ)}; give another folder.")

    def save(self, step: int, config: dict[str, Any], parts: dict[str, Stateful], own: dict[str, Stateful]) -> None:
        """Replace the files. Whoever reads them, or is killed meanwhile, has the old ones or the new ones.

        On every rank: rank 0 saves the parts that all share, and each rank its own, if there are such.
        """
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if own:
            _write(self._own_file(step, rank), _states(own))
            dist.barrier()
        if rank == 0:
            saved = {"step": step, "config": config, "parts": _states(parts), "num_own": num_ranks if own else 0}
            _write(self.file, saved)
        if own:
            dist.barrier()
            for file in self.folder.glob(f"checkpoint_step*_rank{rank}.*"):
                if file != self._own_file(step, rank):
                    file.unlink()

    def load(self, parts: dict[str, Stateful], own: dict[str, Stateful]) -> int:
        """Load the parts, on every rank alike, and this rank's own, or where there were fewer ranks, those of one of
        them. Returns the number of steps done, 0 without a file.

        Raises: RuntimeError on every rank if they found different files.
        """
        saved = self._read()
        step: int = saved["step"] if saved is not None else 0
        steps: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the ranks found different checkpoints in {self.folder}, of steps {steps}; it must be one folder that "
                "every host sees."
            )
        if saved is not None:
            states = saved["parts"]
            if own:
                states |= _load(self._own_file(step, dist.get_rank() % saved["num_own"]))
            for name, part in {**parts, **own}.items():
                part.load_state_dict(states[name])
        return step

    def _own_file(self, step: int, rank: int) -> Path:
        return self.folder / f"checkpoint_step{step}_rank{rank}.pt"

    def _read(self) -> dict[str, Any] | None:
        return _load(self.file) if self.file.exists() else None


def _states(parts: dict[str, Stateful]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


def _write(file: Path, saved: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    torch.save(saved, partial)
    os.replace(partial, file)


def _load(file: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return saved
