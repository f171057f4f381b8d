"""Gradients of several micro-batches summed in packed trits, outside any optimizer; see `rounded_sum` for how."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vsa_ddp.config import Backend
from vsa_ddp.rounded_sum import RoundedSum, Rounding, rounded_bytes, rounded_sum


class TernaryGradientAccumulator:
    """The sum of named gradients over micro-batches, in about 3.3 bits per parameter instead of 32.

    The sum is unbiased, and a function of the gradients, their names, the seed and how many were taken before: the same
    in every process on a machine. Parameters with one dimension or none and those of less than 1024 elements are summed
    in float32. A gradient that is not finite shows in its own parameter's sum, as it would in float32.

    Args:
        accumulation_steps: micro-batches after which `ready_for_update` says so; nothing else depends on it.
        trits: per element. 1, 2 or 3 take some 1.7, 3.3 or 4.9 bits, and leave a noise of 1.9, 0.15 or
            0.021 of its energy in the sum of eight unrelated gradients.
        seed: of the keys.
        backend: as in `VsaConfig`. All give the same bits.

    Raises: ValueError naming the setting, the rule and the value.
    """

    def __init__(self, accumulation_steps: int, *, trits: int = 2, seed: int = 0, backend: Backend = "auto") -> None:
        _check_count("accumulation_steps", accumulation_steps)
        self.accumulation_steps = accumulation_steps
        self._rounding = Rounding(trits, seed, backend)
        self._sums: dict[str, RoundedSum] = {}
        self._count = self._draws = 0

    @torch.no_grad()
    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's gradients. Those of parameters that it did not reach may be missing.

        Nothing of them is kept, and they are not written to.
        Raises: ValueError if a gradient is sparse, not of real floats or of another shape than before; then none is
            added.
        """
        for name, gradient in gradients.items():
            self._check(name, gradient)
        for name, gradient in gradients.items():
            total = self._sums.get(name) or rounded_sum(name, tuple(gradient.shape), self._rounding)
            total.take(gradient.detach(), self._draws)
            self._sums[name] = total
        self._draws += 1
        self._count += 1

    def get_accumulated(self) -> dict[str, Tensor]:
        """The sums so far, in float32. Divide them by `count` for means."""
        sums = {
            name: torch.zeros(total.shape, dtype=torch.float32, device=total.device)
            for name, total in self._sums.items()
        }
        self.add_to(sums)
        return sums

    @torch.no_grad()
    def add_to(self, gradients: Mapping[str, Tensor], *, divisor: int = 1) -> None:
        """Make each gradient (itself + its sum so far) / divisor, in place: calculated in float32, rounded once.

        For the last micro-batch: its gradients take part as they are, without another rounding. Sums that have no
        gradient here are left out.
        Raises: ValueError as `accumulate`.
        """
        for name, gradient in gradients.items():
            self._check(name, gradient)
        for name, gradient in gradients.items():
            if name in self._sums:
                self._sums[name].add_to(gradient, divisor)
            elif divisor != 1:
                gradient.div_(divisor)

    def reset(self) -> None:
        """Forget the sums. The keys go on: no two sums have the same."""
        self._sums.clear()
        self._count = 0

    @property
    def count(self) -> int:
        """Micro-batches in the sums."""
        return self._count

    @property
    def ready_for_update(self) -> bool:
        """Whether as many micro-batches have been added as an update takes."""
        return self._count >= self.accumulation_steps

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that have sums."""
        return {name: total.shape for name, total in self._sums.items()}

    @property
    def num_bytes(self) -> int:
        """What the sums take: all that is allocated between two micro-batches."""
        return sum(total.num_bytes for total in self._sums.values())

    def memory_savings(self) -> float:
        """The share of bytes saved against one sum in float32, 0..1; 0 while there is no sum."""
        dense_bytes = sum(4 * math.prod(shape) for shape in self.shapes.values())
        return 1.0 - self.num_bytes / dense_bytes if dense_bytes else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, for torch.save."""
        return {
            "settings": self._settings(),
            "count": self._count,
            "draws": self._draws,
            "sums": {name: total.state_dict() for name, total in self._sums.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` told. Raises: ValueError if it holds sums that were made with other settings."""
        if state["count"] and state["settings"] != self._settings():
            raise ValueError(
                f"the saved sums were made with {state['settings']}, and this accumulator has {self._settings()}; make "
                "it with the saved settings, or save after an update, when there is no sum."
            )
        self._count, self._draws = state["count"], state["draws"]
        self._sums = {}
        for name, saved in state["sums"].items():
            self._sums[name] = rounded_sum(name, tuple(saved["shape"]), self._rounding)
            self._sums[name].load_state_dict(saved)

    def __repr__(self) -> str:
        return (
            f"TernaryGradientAccumulator({self._count} of {self.accumulation_steps} micro-batches, "
            f"{len(self._sums)} parameters in {self.num_bytes} bytes, {self._rounding})"
        )

    def _settings(self) -> dict[str, int]:
        rounding = self._rounding
        return {"accumulation_steps": self.accumulation_steps, "trits": rounding.trits, "seed": rounding.seed}

    def _check(self, name: str, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse; make its layer with sparse=False.")
        if not gradient.is_floating_point():
            raise ValueError(f"the gradient of {name} must have real floats, got {gradient.dtype}.")
        known = self._sums.get(name)
        if known is not None and known.shape != gradient.shape:
            raise ValueError(
                f"the gradient of {name} has shape {tuple(gradient.shape)}, and its sum {known.shape}; reset() first."
            )


def calculate_memory_savings(param_count: int, micro_batches: int = 1, *, trits: int = 2) -> float:
    """The share of bytes that a sum in trits saves against a float32 gradient kept of each micro-batch, 0..1.

    With one micro-batch that is against one sum in float32, which is what PyTorch keeps however many there are: 0.897
    for a million parameters, and 0.990 with ten. Counted for one square matrix, as it is allocated.

    Raises: ValueError for counts below 1, or trits other than 1, 2 and 3.
    """
    _check_count("param_count", param_count)
    _check_count("micro_batches", micro_batches)
    Rounding(trits, seed=0, backend="auto")
    side = math.isqrt(param_count - 1) + 1
    return 1.0 - rounded_bytes((-(-param_count // side), side), trits) / (4 * param_count * micro_batches)


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
