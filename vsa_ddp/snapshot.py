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
        self._buffers: dict[str, Tensor] = {}
        self._state: list[Any] = []

    @property
    def held(self) -> bool:
        """Whether there is a copy."""
        return bool(self._parameters)

    def take(self) -> None:
        """Keep the present, in place of what there was."""
        self.drop()
        self._parameters = [p.detach().clone() for p in self._all_parameters()]
        self._buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        self._state = copy.deepcopy([self._state_of.get(p) for p in self._all_parameters()])

    def drop(self) -> None:
        """Free it."""
        self._parameters, self._buffers, self._state = [], {}, []

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
        for name, buffer in self._model.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])
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
        """For a checkpoint that one rank may save for all: without buffers, which are each rank's own; None where the
        optimizer's state is that too, as ZeroRedundancyOptimizer's, and if nothing is kept."""
        if not self.held or self._is_sharded:
            return None
        file = io.BytesIO()
        torch.save({"parameters": self._parameters, "state": self._state}, file)
        return file.getvalue()

    def from_bytes(self, saved: bytes | None) -> None:
        """What `to_bytes` gave, of the same parameters, on whatever device."""
        self.drop()
        if saved is None:
            return
        parameters = list(self._all_parameters())

        def place(storage: torch.UntypedStorage, saved_on: str) -> torch.UntypedStorage:
            return storage if saved_on == "cpu" else storage.to(device=parameters[0].device)

        found = torch.load(io.BytesIO(saved), weights_only=True, map_location=place)  # type: ignore[arg-type]
        self._parameters = found["parameters"]
        for p, state in zip(parameters, found["state"], strict=True):
            for name, value in (state or {}).items():
                if isinstance(value, Tensor) and value.dim():  # counts of steps may be on the CPU everywhere
                    state[name] = value.to(p.device)
            self._state.append(state)

    def _all_parameters(self) -> Iterator[Tensor]:
        stepped = [p for group in self._optimizer.param_groups for p in group["params"]]
        yield from dict.fromkeys([*self._model.parameters(), *stepped])

    @property
    def _is_sharded(self) -> bool:
        """ZeroRedundancyOptimizer has another optimizer for this rank's share."""
        return hasattr(self._optimizer, "optim")

    @property
    def _state_of(self) -> dict[Tensor, Any]:
        state: dict[Tensor, Any] = getattr(self._optimizer, "optim", self._optimizer).state
        return state
