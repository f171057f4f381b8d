"""Compile every triton kernel for a Hopper GPU, on a machine with or without one, and print their names:

python -m tests.hopper
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.test_kernels import passes, sparse_passes
from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels.triton_kernels import TritonKernels


class Hopper:
    """What triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    names = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert "fma" not in kernel.asm["ptx"], f"{self.fn.__name__} has fused products, which round otherwise"
        assert ".ftz" not in kernel.asm["ptx"], f"{self.fn.__name__} takes the smallest floats for zero"
        names.add(self.fn.__name__)

    driver.set_active(Hopper())
    JITFunction.run = compile_only
    for dtype in (torch.float32, torch.bfloat16):
        passes(TritonKernels(), VsaConfig(), dtype)
    for sparsity in (2, 16, 128):
        sparse_passes(TritonKernels(), VsaConfig(sparsity=sparsity))
    print(*sorted(names))


if __name__ == "__main__":
    main()
