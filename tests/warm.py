"""Compiles the kernels on import, so that the server process of `ranks` does it once for all its children."""

import torch

from vsa_ddp import VsaConfig
from vsa_ddp.kernels import load_kernels
from vsa_ddp.layout import plan_bucket

torch.set_num_threads(1)  # threads would not survive the fork


def _compile() -> None:
    cpu = torch.device("cpu")
    kernels = load_kernels("auto", cpu)
    bucket = kernels.for_bucket(plan_bucket((("weight", (32, 32)),), VsaConfig()), 0, cpu)
    keys = bucket.keys(0)
    y_TK = kernels.rotate(bucket.encode(torch.ones(1024), torch.ones(64), keys))
    packed_TP, energy_T, _ = kernels.quantize(y_TK)
    lanes_TL, _, _ = kernels.quantize_to_digits(y_TK, energy_T, 2)
    kernels.sums_of_digits(lanes_TL, 1024, 2)
    bucket.decode_(torch.ones(1024), torch.ones(64), keys, kernels.mean_of_packed(packed_TP[None], None, 1024))


_compile()
