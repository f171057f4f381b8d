"""How fast is the link of a running group, and this machine's arithmetic? Measured once, the same answer on all ranks.

Shape letters: T rotation blocks of K elements.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vsa_ddp.cost import CPU_CORE, Advice, LinkSpeed, advise
from vsa_ddp.kernels import load_kernels
from vsa_ddp.stats import ByteCounter
from vsa_ddp.wires import Link

_FIRST_NUMEL = 2**16
_LAST_NUMEL = 2**22
_LONG_ENOUGH_S = 0.2
"""A transfer that takes so long has outlasted what links and their buffers take in at once."""
_ROTATED = 2**20


def measure_link(group: dist.ProcessGroup, device: torch.device) -> LinkSpeed:
    """The slowest rank's link, as all-reduces see it, their arithmetic included. Collective, blocks.

    By all-reduces of 256 KiB and up, until one takes a fifth of a second. With one rank there is no link: infinitely
    fast.
    """
    link, w = Link(group, ByteCounter()), group.size()
    if w == 1:
        return LinkSpeed(float("inf"), 0.0)
    hops = 2 * (w - 1)
    small_s = statistics.median(_all_reduce_s(link, 1, device) for _ in range(9))
    numel, long_s = _FIRST_NUMEL // 2, 0.0
    while long_s < _LONG_ENOUGH_S and numel < _LAST_NUMEL:
        numel *= 2
        least = min(_all_reduce_s(link, numel, device) for _ in range(3))
        (long_s,) = _longest(group, device, least)  # all go on, or stop, together
    num_bytes = 4 * numel * hops / w
    latency_s, s_per_byte = _longest(group, device, small_s / hops, max(long_s - small_s, 1e-9) / num_bytes)
    return LinkSpeed(1 / s_per_byte, latency_s)


def measure_slowdown(group: dist.ProcessGroup, device: torch.device) -> float:
    """The slowest rank's time for a rotation over that of the machine of `cost.CPU_CORE`. Collective, blocks."""
    (slowest,) = _longest(group, device, rotation_s(device) / CPU_CORE.reference_rotation_s)
    return slowest


def rotation_s(device: torch.device) -> float:
    """Seconds of one rotation of 2**20 elements by the fastest backend that is there, the least of several."""
    rotate = load_kernels("auto", device).rotate
    y_TK = torch.zeros(_ROTATED // 1024, 1024, device=device)
    rotate(y_TK)
    return min(_seconds(lambda: rotate(y_TK), device) for _ in range(20))


def advise_group(
    group: dist.ProcessGroup,
    device: torch.device,
    num_parameters: int,
    world_size: int,
    *,
    gbit_per_s: float | None = None,
    **code: Any,
) -> Advice:
    """`cost.advise` from what is measured in the group, the same on all ranks. Collective, blocks.

    Args: `gbit_per_s` as stated, which spares measuring the link; `world_size` of those that exchange; `code` as there.
    """
    latency_ms = 0.1
    if gbit_per_s is None:
        link = measure_link(group, device)
        gbit_per_s, latency_ms = link.bytes_per_s * 8e-9, link.latency_s * 1e3
    return advise(
        num_parameters,
        world_size,
        gbit_per_s=gbit_per_s,
        latency_ms=latency_ms,
        slowdown=measure_slowdown(group, device),
        **code,
    )


def _longest(group: dist.ProcessGroup, device: torch.device, *values: float) -> list[float]:
    """The greatest of all ranks' values, each."""
    greatest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group)
    found: list[float] = greatest.tolist()
    return found


def _all_reduce_s(link: Link, numel: int, device: torch.device) -> float:
    tensor = torch.zeros(numel, device=device)
    return _seconds(lambda: link.all_reduce_sum_(tensor).wait(), device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
