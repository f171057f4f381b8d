"""Ways to lose less at the same bytes that were tried and are no part of the hook: each a few lines around its codec.

What they cost or gain stands beside the hook's own settings in the last table of `bench_training`'s page.

Shape letters: W ranks, N elements of the gradient.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.lockstep import LockstepHook, Shapes
from benchmarks.rivals import PowerSGD
from vsa_ddp.config import VsaConfig
from vsa_ddp.layout import is_compressed


class _Lead:
    """Counts the bytes of its parts."""

    def __init__(self, shapes: Shapes, config: VsaConfig) -> None:
        self._shapes = shapes
        self._config = config
        self._sizes = [math.prod(shape) for _, shape in shapes]
        self._parts: list[LockstepHook | PowerSGD] = []
        self.step = 0

    @property
    def sent_bytes(self) -> float:
        return sum(part.sent_bytes for part in self._parts)

    @property
    def received_bytes(self) -> float:
        return sum(part.received_bytes for part in self._parts)

    def average(self, gradient_WN: Tensor) -> Tensor:
        """The gradient that every rank goes on with. Shapes: (W, N) -> (N,)."""
        mean_N = self._average(gradient_WN)
        self.step += 1
        return mean_N

    def _average(self, gradient_WN: Tensor) -> Tensor:
        raise NotImplementedError


class ErrorMemory(_Lead):
    """Each rank adds to its gradient what it has not sent, at the shrunk gain, at which the memory stays bounded."""

    def __init__(self, shapes: Shapes, config: VsaConfig) -> None:
        super().__init__(shapes, replace(config, gain="shrunk"))
        self._hooks: list[LockstepHook] = []
        self._memory_WN = torch.zeros(())
        self._exact_bytes = 0.0

    def _average(self, gradient_WN: Tensor) -> Tensor:
        if not self._hooks:  # of one rank each, by the same keys
            self._hooks = [LockstepHook(self._shapes, self._config) for _ in gradient_WN]
        wanted_WN = gradient_WN + self._memory_WN
        sent_WN = torch.stack([h.average(g_N[None].clone()) for h, g_N in zip(self._hooks, wanted_WN, strict=True)])
        self._memory_WN = wanted_WN - sent_WN
        if self.step < self._config.exact_steps:
            self._exact_bytes = self.sent_bytes
        return sent_WN.mean(0)

    @property
    def sent_bytes(self) -> float:
        return self._hooks[0].sent_bytes

    @property
    def received_bytes(self) -> float:
        w = len(self._hooks)
        return (w - 1) * (self.sent_bytes - self._exact_bytes + 2 * self._exact_bytes / w)


class SharedPrediction(_Lead):
    """Ranks send what their gradients differ from a running mean of all decoded ones, times what of it was right so
    far in each parameter."""

    decay = 0.9

    def __init__(self, shapes: Shapes, config: VsaConfig) -> None:
        super().__init__(shapes, config)
        self._hook = LockstepHook(shapes, config)
        self._parts = [self._hook]
        self._momentum_N = torch.zeros(sum(self._sizes))
        self._products = torch.zeros(2, len(shapes))

    def _average(self, gradient_WN: Tensor) -> Tensor:
        product, square = self._products
        share = torch.where(square > 0, product / square, 0.0).clamp(0, 1)
        prediction_N = self._momentum_N * share.repeat_interleave(torch.tensor(self._sizes))
        mean_N = prediction_N + self._hook.average(gradient_WN - prediction_N)
        found = [
            torch.stack([m.dot(g), m.dot(m)])
            for m, g in zip(self._momentum_N.split(self._sizes), mean_N.split(self._sizes), strict=True)
        ]
        self._products.lerp_(torch.stack(found, 1), 1 - self.decay)
        self._momentum_N.lerp_(mean_N, 1 - self.decay)
        return mean_N


class LowRankHead(_Lead):
    """The matrices' first component by PowerSGD without error feedback, and the hook for the rest."""

    def __init__(self, shapes: Shapes, config: VsaConfig) -> None:
        super().__init__(shapes, config)
        self._hook, self._power = LockstepHook(shapes, config), PowerSGD(shapes, config.seed, rank=1, start_step=0)
        self._parts = [self._hook, self._power]

    def _average(self, gradient_WN: Tensor) -> Tensor:
        head_N = torch.zeros_like(gradient_WN[0])
        if self.step >= self._config.exact_steps:
            for (name, shape), head, part in zip(
                self._shapes, head_N.split(self._sizes), gradient_WN.split(self._sizes, 1), strict=True
            ):
                if is_compressed(shape, self._config):
                    head.copy_(self._power.average_matrix(name, part.reshape(len(part), shape[0], -1)).flatten())
            self._power.forget()
        return head_N + self._hook.average(gradient_WN - head_N)


class ByEnergy(_Lead):
    """Of the compressed parameters the loudest, as the first step's gradient has them, by another sparsity than the
    others: as many as have half of all elements, one at least."""

    def __init__(self, shapes: Shapes, config: VsaConfig, quiet: int) -> None:
        super().__init__(shapes, config)
        self._quiet = quiet
        self._chosen: list[Tensor] = []

    def _average(self, gradient_WN: Tensor) -> Tensor:
        if not self._chosen:
            self._split(gradient_WN.mean(0))
        mean_N = torch.empty_like(gradient_WN[0])
        for hook, chosen in zip(self._parts, self._chosen, strict=True):
            mean_N[chosen] = hook.average(gradient_WN[:, chosen])
        return mean_N

    def _split(self, mean_N: Tensor) -> None:
        energies = [part.square().mean().item() for part in mean_N.split(self._sizes)]
        compressed = [i for i, (_, shape) in enumerate(self._shapes) if is_compressed(shape, self._config)]
        loud, room = set[int](), sum(self._sizes) / 2
        for i in sorted(compressed, key=lambda i: -energies[i]):
            room -= self._sizes[i]
            if loud and room < 0:
                break
            loud.add(i)
        starts = torch.tensor([0, *self._sizes]).cumsum(0).tolist()
        quiet = set(range(len(self._sizes))) - loud
        for wanted, sparsity in ((loud, self._config.sparsity), (quiet, self._quiet)):
            mine = sorted(wanted)
            config = replace(self._config, sparsity=sparsity)
            self._parts.append(LockstepHook(tuple(self._shapes[i] for i in mine), config))
            self._chosen.append(torch.cat([torch.arange(starts[i], starts[i + 1]) for i in mine]))


class Schedule(_Lead):
    """One sparsity for the first 60 % of a run, another after."""

    def __init__(self, shapes: Shapes, config: VsaConfig, later: int, steps: int) -> None:
        super().__init__(shapes, config)
        config_later = replace(config, sparsity=later, exact_steps=0)
        self._parts = [LockstepHook(shapes, config), LockstepHook(shapes, config_later)]
        self._switch = 0.6 * steps

    def _average(self, gradient_WN: Tensor) -> Tensor:
        return self._parts[self.step >= self._switch].average(gradient_WN)
