"""How long communication takes in each step: the same clock for every hook, and for the averager."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from vsa_ddp import VsaModelAverager

_Mark = Any  # a host time in ms, or a CUDA event


class TimedDDP(DistributedDataParallel):
    """DDP that times its hook: from a bucket handed to it until its result, codec and wire.

    Buckets that overlap count once. On CUDA by events, read after the step's work is done; elsewhere by the host's
    clock.
    """

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self._intervals: list[tuple[_Mark, _Mark]] = []

    def register_comm_hook(self, state: object, hook: Any) -> None:
        def timed_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            start = self._mark()

            def finished(done: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
                self._intervals.append((start, self._mark()))
                return done.value()

            return hook(state, bucket).then(finished)

        super().register_comm_hook(state, timed_hook)

    def take_hook_ms(self) -> float:
        """Milliseconds in the hook since the last call; 0 if it was not called. Waits for CUDA events."""
        intervals, self._intervals = self._intervals, []
        if not intervals:
            return 0.0
        if self.device_type == "cuda":
            for _, end in intervals:
                end.synchronize()
            origin = intervals[0][0]
            intervals = [(origin.elapsed_time(start), origin.elapsed_time(end)) for start, end in intervals]
        total, reached = 0.0, float("-inf")
        for start, end in sorted(intervals):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total

    def _mark(self) -> _Mark:
        if self.device_type != "cuda":
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TimedAverager(VsaModelAverager):
    """An averager that times itself, by the host's clock, from the end of the optimizer's step on."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        super().__init__(model, optimizer, **settings)
        self._ms = 0.0

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        super().synchronize()
        self._ms += (time.perf_counter() - start) * 1e3

    def take_hook_ms(self) -> float:
        """Milliseconds in averages since the last call."""
        ms, self._ms = self._ms, 0.0
        return ms
