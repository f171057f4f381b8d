"""An optimizer that steps once for several micro-batches, on a sum of their gradients kept in packed trits."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from vsa_ddp.accumulate import TernaryGradientAccumulator
from vsa_ddp.config import Backend

Reduction = Literal["mean", "sum"]


class OptimizerStats(NamedTuple):
    """What `TernaryOptimizerWrapper.stats` tells, since the wrapper was made."""

    steps: int
    """Steps of the wrapped optimizer."""
    micro_batches: int
    """Calls of `step`."""
    pending: int
    """Micro-batches that wait for a step."""
    max_bytes: int
    """The most that the sums took."""
    memory_savings: float
    """The share of bytes saved against sums in float32, when they took the most; 0 if there was no sum yet."""


class TernaryOptimizerWrapper(Optimizer):
    """Steps the wrapped optimizer once for several micro-batches, on their gradients' mean or sum.

        optimizer = TernaryOptimizerWrapper(torch.optim.AdamW(model.parameters()), accumulation_steps=8)
        for x, y in micro_batches:
            loss_of(model(x), y).backward()
            optimizer.step()  # every eighth call moves the parameters
            optimizer.zero_grad()

    `step` takes what backward left in `.grad` and frees it. What lies beside the next micro-batch's activations is then
    the sum in trits: 0.4 bytes per parameter instead of 4. The last micro-batch's gradients are added without rounding.
    With one accumulation step this is the wrapped optimizer, bit for bit.

    Param groups, state, defaults, `zero_grad` and hooks are the wrapped optimizer's. `state_dict` has one entry more,
    the sums; either loads the other's. A learning rate schedule counts updates: `if optimizer.updated:
    scheduler.step()`. To clip an update's gradients use `register_step_pre_hook`, which runs when they are complete.
    Under DDP leave out `no_sync`: every micro-batch has to be reduced, so that all ranks keep equal sums.

    Args:
        optimizer: any that evaluates the loss once in a step.
        accumulation_steps: micro-batches per update.
        reduction: "mean" divides by them; "sum" is for losses that are divided already.
        trits, seed, backend: see `TernaryGradientAccumulator`.

    Raises: TypeError for what is no optimizer, or for one that evaluates the loss several times in a step (LBFGS);
        ValueError naming the setting, the rule and the value.
    """

    _step_supports_amp_scaling = False
    """Not even where the wrapped optimizer's does: GradScaler has to unscale each micro-batch before it is added."""

    def __init__(
        self,
        optimizer: Optimizer,
        accumulation_steps: int,
        *,
        reduction: Reduction = "mean",
        trits: int = 2,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        # without Optimizer's own __init__: what that would set is the wrapped optimizer's, see __getattr__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(optimizer).__name__} evaluates the loss several times in a step, which a sum of micro-batches "
                "cannot serve; use an optimizer whose step needs no closure."
            )
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}.")
        self.optimizer = optimizer
        self.accumulator = TernaryGradientAccumulator(accumulation_steps, trits=trits, seed=seed, backend=backend)
        self.updated = False
        """Whether the last `step` moved the parameters."""
        self._divisor = accumulation_steps if reduction == "mean" else 1
        self._steps = self._micro_batches = self._max_bytes = 0
        self._memory_savings = 0.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take this micro-batch's gradients; with the last one's, step the wrapped optimizer.

        Args:
            closure: evaluated once, with gradients: it calls backward and returns the loss.

        Returns what the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._micro_batches += 1
        self.updated = self.accumulator.count + 1 >= self.accumulator.accumulation_steps
        if self.updated:
            self._update()
        else:
            self._accumulate()
        return loss

    def _accumulate(self) -> None:
        sums = self.accumulator
        sums.accumulate({name: p.grad for name, p in self._parameters() if p.grad is not None})
        for _, p in self._parameters():
            p.grad = None
        if sums.num_bytes > self._max_bytes:
            self._max_bytes, self._memory_savings = sums.num_bytes, sums.memory_savings()

    def _update(self) -> None:
        sums = self.accumulator
        for name, p in self._parameters():
            if p.grad is None and name in sums.shapes:
                p.grad = torch.zeros_like(p)
        sums.add_to({name: p.grad for name, p in self._parameters() if p.grad is not None}, divisor=self._divisor)
        sums.reset()
        self.optimizer.step()
        self._steps += 1

    def stats(self) -> OptimizerStats:
        pending = self.accumulator.count
        return OptimizerStats(self._steps, self._micro_batches, pending, self._max_bytes, self._memory_savings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's: of `.grad`. The sums stay; `accumulator.reset()` drops them."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with sums and counts as "accumulator"."""
        return {**self.optimizer.state_dict(), "accumulator": self.accumulator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` told, of this class or of the wrapped optimizer's, which has no sums.

        Raises: ValueError if the sums were made with other settings, and the wrapped optimizer's own errors.
        """
        saved = dict(state_dict)
        sums = saved.pop("accumulator", None)
        if sums is None:
            self.accumulator.reset()
        else:
            self.accumulator.load_state_dict(sums)
        self.optimizer.load_state_dict(saved)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        """All else is the wrapped optimizer's, such as where Optimizer's methods register hooks."""
        if name == "optimizer":  # not there yet, while this is unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # a learning rate schedule puts its own `step` here, which cannot be pickled
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"TernaryOptimizerWrapper({self.accumulator!r}, {self.optimizer!r})"

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, numbered in the order of the groups: new ones are added at the end."""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        for number, p in enumerate(parameters):
            yield f"parameter {number}", p
