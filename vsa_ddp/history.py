"""What a predictor keeps of the gradient's size: tensors that change in place, or roundings in packed trits."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from vsa_ddp.config import HistoryDtype
from vsa_ddp.rounded_sum import RoundedSum, Rounding, rounded_sum

Gradients = dict[str, Tensor]

_ROUNDING = Rounding(trits=3, seed=0, backend="auto")


class Buffer(Protocol):
    """A number for each element of some parameters, by name."""

    def allocate(self, names: Iterable[str]) -> None:
        """Zeros for those that it has not had yet."""

    def portions(self, names: Iterable[str] | None = None) -> list[list[str]]:
        """Those of the names, or all, that it has: as many at a time as should be read together."""

    def read(self, names: Iterable[str]) -> Gradients:
        """To be calculated with, and changed in place if `write` follows."""

    def write(self, values: Gradients, draw: int) -> None:
        """Keep what `read` gave, changed. Args: `draw` numbers the roundings of a parameter."""

    @property
    def num_bytes(self) -> int:
        """What it takes between two steps."""

    def state_dict(self) -> dict[str, Any]:
        """Copies; of all parameters, with zeros for those that it has not had."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` told of a buffer of the same kind; zeros for what is not in it."""


def make_buffer(label: str, parameters: Mapping[str, Tensor], dtype: HistoryDtype) -> Buffer:
    """An empty one. Args: `label` is another for each buffer of a predictor."""
    return TritBuffer(label, parameters) if dtype == "trits" else TensorBuffer(parameters, dtype)


class TensorBuffer:
    """Tensors on the parameters' devices."""

    def __init__(self, parameters: Mapping[str, Tensor], dtype: HistoryDtype) -> None:
        self._parameters = parameters
        self._dtype = torch.bfloat16 if dtype == "bfloat16" else None
        self._kept: Gradients = {}

    def allocate(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._kept:
                self._kept[name] = self._zeros(self._parameters[name])

    def portions(self, names: Iterable[str] | None = None) -> list[list[str]]:
        wanted = self._kept.keys() if names is None else self._kept.keys() & set(names)
        return [[name for name in self._kept if name in wanted]]

    def read(self, names: Iterable[str]) -> Gradients:
        return {name: self._kept[name] for name in names}

    def write(self, values: Gradients, draw: int) -> None:
        """They have changed already."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())

    def state_dict(self) -> dict[str, Any]:
        return {n: self._kept[n].clone() if n in self._kept else self._zeros(p) for n, p in self._parameters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.allocate(self._parameters)
        for name, tensor in state.items():
            self._kept[name].copy_(tensor)

    def _zeros(self, parameter: Tensor) -> Tensor:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return torch.zeros_like(parameter, dtype=self._dtype or wide)


class TritBuffer:
    """Three trits for each element, about 4.9 bits, as `rounded_sum` keeps a sum: decoded, changed, rounded again."""

    def __init__(self, label: str, parameters: Mapping[str, Tensor]) -> None:
        self._label = label
        self._parameters = parameters
        self._kept: dict[str, RoundedSum] = {}

    def allocate(self, names: Iterable[str]) -> None:
        new = [name for name in names if name not in self._kept]
        self.write({name: self._zeros(name) for name in new}, 0)

    def portions(self, names: Iterable[str] | None = None) -> list[list[str]]:
        wanted = self._kept.keys() if names is None else self._kept.keys() & set(names)
        return [[name] for name in self._kept if name in wanted]

    def read(self, names: Iterable[str]) -> Gradients:
        values = {name: self._zeros(name) for name in names}
        for name, value in values.items():
            self._kept[name].add_to(value, 1)
        return values

    def write(self, values: Gradients, draw: int) -> None:
        self._kept |= {name: self._round(name, value, draw) for name, value in values.items()}

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept.values())

    def state_dict(self) -> dict[str, Any]:
        kept = {n: self._kept.get(n) or self._round(n, self._zeros(n), 0) for n in self._parameters}
        return {name: each.state_dict() for name, each in kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            self._kept[name] = self._empty(name)
            self._kept[name].load_state_dict(saved)
        self.allocate(self._parameters)

    def _zeros(self, name: str) -> Tensor:
        return torch.zeros_like(self._parameters[name], dtype=torch.float32)

    def _empty(self, name: str) -> RoundedSum:
        return rounded_sum(f"{self._label}/{name}", tuple(self._parameters[name].shape), _ROUNDING)

    def _round(self, name: str, value: Tensor, draw: int) -> RoundedSum:
        kept = self._empty(name)
        kept.take(value, draw)
        return kept
