"""What a training run needs to go on after a restart: one file, in a folder that every host sees."""

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
    """Where and how often a run is saved. Rank 0 writes, every rank reads."""

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

    def save(self, step: int, config: dict[str, Any], parts: dict[str, Stateful]) -> None:
        """Replace the file. Whoever reads it, or is killed meanwhile, has the old one or the new one."""
        states = {name: part.state_dict() for name, part in parts.items()}
        partial = self.file.with_suffix(".partial")
        torch.save({"step": step, "config": config, "parts": states}, partial)
        os.replace(partial, self.file)

    def load(self, parts: dict[str, Stateful]) -> int:
        """Load the parts, on every rank alike. Returns the number of steps done, 0 without a file.

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
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
        return step

    def _read(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        saved: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        return saved
