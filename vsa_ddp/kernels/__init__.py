"""The passes over a bucket, by one of three backends with the same bits: torch, numba (CPU), triton (CUDA).

The only place that imports numba and triton, and only when one of them is asked for.
"""

import functools
import importlib
import importlib.util
import logging
import os
import shutil

import torch

from vsa_ddp.kernels.interface import (
    BucketKernels,
    Gradient,
    Kernels,
    Keys,
    Packed,
    Received,
    Rows,
    Summed,
    encode,
)
from vsa_ddp.kernels.torch_kernels import TorchKernels

__all__ = [
    "BucketKernels",
    "Gradient",
    "Kernels",
    "Keys",
    "Packed",
    "Received",
    "Rows",
    "Summed",
    "TorchKernels",
    "encode",
    "load_kernels",
    "missing",
]

logger = logging.getLogger(__name__)

_DEVICE = {"numba": "cpu", "triton": "cuda"}
_REMEDY = {"numba": 'pip install "vsa-ddp[numba]"', "triton": "pip install triton"}


def missing(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot work on `device`, with the remedy; None if it can. "auto" and "torch" always can."""
    wanted = _DEVICE.get(backend, device.type)
    interpreted = backend == "triton" and _triton_interprets()
    if device.type != wanted and not interpreted:
        return f'backend="{backend}" is for {wanted} and gradients are on {device.type}; use backend="auto".'
    if backend in _DEVICE and importlib.util.find_spec(backend) is None:
        return f'backend="{backend}" needs {backend}, which is not installed: {_REMEDY[backend]}, or backend="auto".'
    return None


def load_kernels(backend: str, device: torch.device) -> Kernels:
    """The backend; "auto" takes the fastest that is there: triton on CUDA, numba on a CPU, else torch.

    Raises: ValueError if it is not there.
    """
    if backend == "auto":
        backend = next((b for b in _DEVICE if _DEVICE[b] == device.type and not missing(b, device)), "torch")
        if backend == "triton" and not _has_compiler():
            _warn("triton needs a C compiler, which is not there: install gcc, or set CC; till then torch calculates")
            backend = "torch"
    if reason := missing(backend, device):
        raise ValueError(reason)
    if backend == "torch":
        return TorchKernels()
    module = importlib.import_module(f"vsa_ddp.kernels.{backend}_kernels")
    kernels: Kernels = getattr(module, f"{backend.capitalize()}Kernels")()
    return kernels


def _has_compiler() -> bool:
    """Whether triton finds what it builds its launchers with; images without compilers are usual on GPU machines."""
    return any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang"))))


@functools.cache
def _warn(text: str) -> None:
    """Once."""
    logger.warning(text)


def _triton_interprets() -> bool:
    """Whether triton runs on CPU tensors, for tests: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"
