"""Compiles the kernels on import, so that the server process of `ranks` does it once for all its children."""

import torch

from tests.test_kernels import CPU, passes, sparse_passes
from vsa_ddp import VsaConfig
from vsa_ddp.kernels import load_kernels

torch.set_num_threads(1)  # threads would not survive the fork
passes(load_kernels("auto", CPU), VsaConfig(bundle=4))
sparse_passes(load_kernels("auto", CPU), VsaConfig())
