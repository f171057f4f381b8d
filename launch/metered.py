"""A process group that counts what it is given: every method of training is measured by the same meter.

`init_process_group("metered")` makes a gloo or NCCL group inside and passes each collective on, adding the bytes of its
input tensors on the way. DDP's own all-reduces go through it as well as those of any hook, in any group.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Collective -> position of its input among the arguments; old and new names of torch 2.8 to 2.13
_INPUT = {
    "allreduce": 0,
    "allreduce_coalesced": 0,
    "broadcast": 0,
    "reduce": 0,
    "send": 0,
    "allgather": 1,
    "allgather_coalesced": 1,
    "gather": 1,
    "scatter": 1,
    "reduce_scatter": 1,
    "alltoall": 1,
    "_allgather_base": 1,
    "_reduce_scatter_base": 1,
    "alltoall_base": 1,
    "all_gather_single": 1,
    "all_to_all_single": 1,
    "reduce_scatter_single": 1,
    "barrier": None,
    "recv": None,
}


_lock = threading.Lock()
_total = 0


def wire_bytes() -> int:
    """Bytes that this process has handed to the collectives of all its metered groups."""
    return _total


class MeteredGroup(dist.ProcessGroup):
    """Counts the bytes handed to the collectives of `inner`, a gloo or NCCL group."""

    def __init__(self, inner: dist.ProcessGroup, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self._inner = inner

    @property
    def _device_types(self) -> list[torch.device]:
        """Where torch puts what it sends on its own behalf, in barriers and object collectives."""
        return self._inner._device_types

    def _get_backend(self, device: torch.device) -> Any:
        return self._inner._get_backend(device)

    def getBackendName(self) -> str:  # noqa: N802  (torch's own name)
        return "metered"


def _metered(name: str, position: int | None) -> Callable[..., Any]:
    def collective(self: MeteredGroup, *args: Any, **options: Any) -> Any:
        global _total
        if position is not None:
            num_bytes = _num_bytes(args[position])
            with _lock:
                _total += num_bytes
        return getattr(self._inner, name)(*args, **options)

    return collective


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(_num_bytes(item) for item in value)


for _name, _position in _INPUT.items():
    setattr(MeteredGroup, _name, _metered(_name, _position))


def _create(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> MeteredGroup:
    inner = dist.ProcessGroup(store, rank, world_size)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        backend, kind, device = dist.ProcessGroupNCCL(store, rank, world_size, options), inner.NCCL, "cuda"
    else:
        backend, kind, device = dist.ProcessGroupGloo(store, rank, world_size, timeout), inner.GLOO, "cpu"
    backend._set_sequence_number_for_group()
    inner._set_default_backend(kind)
    inner._register_backend(torch.device(device), kind, backend)
    inner._set_group_name("metered")
    return MeteredGroup(inner, rank, world_size)


dist.Backend.register_backend("metered", _create, devices=["cpu", "cuda"])
