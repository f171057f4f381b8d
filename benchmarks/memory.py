"""Bytes that an object keeps, and the most that a call holds at once."""

import gc
import json
import os
import tempfile
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# Not owned by who refers to them, or the way to everything in the process
_SHARED = (type, ModuleType, BuiltinFunctionType, weakref.ref)


def kept_bytes(root: object) -> int:
    """Bytes of all tensors and numpy arrays that can be reached from an object, every storage once.

    Attributes, containers, closures and suspended generators are followed; weak references, classes and what a module
    caches are not.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _SHARED):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, np.ndarray):
            if item.base is None:
                storages[item.ctypes.data] = item.nbytes
            else:
                waiting.append(item.base)
        elif isinstance(item, FunctionType):
            waiting.append(item.__closure__)
        else:
            waiting += gc.get_referents(item)
    return sum(storages.values())


class Held(NamedTuple):
    """Bytes beyond what was there before a call."""

    peak: int
    """The most at once."""
    left: int
    """What its result keeps."""


def held_bytes(action: Callable[[], object], device: torch.device) -> Held:
    """What a call allocates, in this thread on a CPU, by all streams on CUDA.

    On a CPU the peaks of torch's allocator and of Python's (numpy's arrays are there) are added: not less than the
    peak of both. Arrays inside compiled numba functions, some rows of a hypervector in each thread, are not seen.
    """
    if device.type == "cuda":
        return _held_on_cuda(action, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler tells stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        tracemalloc.start()
        try:
            result = action()
            left, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    allocated = _allocations(profiler)
    del result
    total = most = 0
    for num_bytes in allocated:
        total += num_bytes
        most = max(most, total)
    return Held(most + peak, total + left)


def _allocations(profiler: Any) -> list[int]:
    """Bytes taken, or given back if negative, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def _held_on_cuda(action: Callable[[], object], device: torch.device) -> Held:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = action()
    torch.cuda.synchronize(device)
    held = Held(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)
    del result
    return held
