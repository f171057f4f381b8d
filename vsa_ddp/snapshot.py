"""A model and its optimizer as they were some steps ago, to go back to."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vsa_ddp.phase import Verdict


class Snapshot:
    """Room for one copy of parameters, buffers and the optimizer's state, on their own devices. Empty at first.

    What has no tensors there is not kept: learning rates go their own way.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._parameters: list[Tensor] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._state: list[Any] = []

    @property
    def held(self) -> bool:
        """Whether there is a copy."""
        return bool(self._parameters)

    def take(self) -> None:
        """Keep the present, in place of what there was."""
        self.drop()
        self._parameters = [p.detach().clone() for p in self._all_parameters()]
        self._buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        self._state = [copy.deepcopy(self._state_of.get(p)) for p in self._all_parameters()]

    def drop(self) -> None:
        """Free it."""
        self._parameters, self._buffers, self._state = [], [], []

    @torch.no_grad()
    def restore(self) -> None:
        """Go back, and free it. Raises: RuntimeError if nothing is kept."""
        if not self.held:
            raise RuntimeError("there is nothing to go back to: take() was not called, or what it kept was dropped.")
        for p, old, state in zip(self._all_parameters(), self._parameters, self._state, strict=True):
            p.copy_(old)
            if state is None:
                self._state_of.pop(p, None)
            else:
                self._state_of[p] = state
        for buffer, old in self._buffers:
            buffer.copy_(old)
        self.drop()

    def settle(self, verdict: Verdict | None, *, in_section: bool) -> None:
        """Go back; or, if the predicted steps were good, keep the present while their section goes on."""
        if verdict is Verdict.UNDO:
            self.restore()
        elif verdict is Verdict.KEEP and in_section:
            self.take()
        elif verdict is Verdict.KEEP:
            self.drop()

    def to_bytes(self) -> bytes | None:
        """For a checkpoint; None if empty. Without buffers: a rank's are its own, and it may save for the others."""
        if not self.held:
            return None
        file = io.BytesIO()
        torch.save({"parameters": self._parameters, "state": self._state}, file)
        return file.getvalue()

    def from_bytes(self, saved: bytes | None) -> None:
        """What `to_bytes` gave, on this or another rank's device."""
        self.drop()
        if saved is None:
            return
        device = next(self._all_parameters()).device

        def place(storage: torch.UntypedStorage, saved_on: str) -> torch.UntypedStorage:
            return storage if saved_on == "cpu" else storage.to(device=device)

        found = torch.load(io.BytesIO(saved), weights_only=True, map_location=place)  # type: ignore[arg-type]
        self._parameters, self._state = found["parameters"], found["state"]

    def _all_parameters(self) -> Iterator[Tensor]:
        stepped = [p for group in self._optimizer.param_groups for p in group["params"]]
        yield from dict.fromkeys([*self._model.parameters(), *stepped])

    @property
    def _state_of(self) -> dict[Tensor, Any]:
        """ZeroRedundancyOptimizer has it in the optimizer of this rank's share."""
        state: dict[Tensor, Any] = getattr(self._optimizer, "optim", self._optimizer).state
        return state
