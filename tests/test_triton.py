"""The triton backend calculates the bits of the torch one: on a GPU, or without one in triton's interpreter."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_compressor import made
from tests.test_kernels import CPU, SHAPES, assert_same, passes, sparse_passes
from vsa_ddp.compressor import VSAGradientCompressor
from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels import Packed, load_kernels
from vsa_ddp.layout import plan_bucket
from vsa_ddp.ternary import level

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

HAS_CUDA = torch.cuda.is_available()
DEVICE = {"torch": CPU, "triton": torch.device("cuda" if HAS_CUDA else "cpu")}
# the interpreter takes 10 ms and more for each row and pass
WIDE = SHAPES if HAS_CUDA else [(7, 33), (5,), (2, 150)]
NARROW = SHAPES if HAS_CUDA else [(100, 3), (130, 1), (2, 3, 4, 5)]

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """Calls a function where triton works: here on a GPU, else in a process that imports triton to interpret."""
    if HAS_CUDA:
        yield lambda function, *args: function(*args)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def config(bundle: int, block: int) -> VsaConfig:
    return VsaConfig(bundle=bundle, rotation_block=block, min_numel=100)


def passes_of(
    backend: str,
    config: VsaConfig,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    num_ranks: int = 2,
) -> dict[str, Tensor]:
    device = DEVICE[backend]
    return passes(load_kernels(backend, device), config, dtype, num_ranks, shapes, device)


@pytest.mark.parametrize("num_ranks", [1, 2, 64])
@pytest.mark.parametrize("bundle", [1, 3])
@pytest.mark.parametrize("block", [128, 1024, 2048])
def test_triton_has_the_bits_of_torch(call: Call, block: int, bundle: int, num_ranks: int) -> None:
    case = config(bundle, block), WIDE, torch.float32, num_ranks
    assert_same(call(passes_of, "triton", *case), passes_of("torch", *case))


@pytest.mark.parametrize("block", [256, 512, 4096, 8192, 16384])
def test_triton_has_the_bits_of_torch_in_every_block(call: Call, block: int) -> None:
    case = config(2, block), WIDE[:1]
    assert_same(call(passes_of, "triton", *case), passes_of("torch", *case))


def sparse_passes_of(backend: str, config: VsaConfig) -> dict[str, Tensor]:
    return sparse_passes(load_kernels(backend, DEVICE[backend]), config, DEVICE[backend])


@pytest.mark.parametrize(("block", "sparsity"), [(128, 2), (256, 4), (128, 16), (1024, 8), (2048, 128)])
def test_triton_has_the_block_codes_of_torch(call: Call, block: int, sparsity: int) -> None:
    case = VsaConfig(bundle=4, rotation_block=block, sparsity=sparsity)
    assert_same(call(sparse_passes_of, "triton", case), sparse_passes_of("torch", case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_triton_has_the_bits_of_torch_in_every_dtype(call: Call, dtype: torch.dtype) -> None:
    case = config(2, 128), NARROW, dtype
    assert_same(call(passes_of, "triton", *case), passes_of("torch", *case))


def there_and_back(backend: str, scale: float) -> dict[str, Tensor]:
    kernels, device = load_kernels(backend, DEVICE[backend]), DEVICE[backend]
    bucket = kernels.for_bucket(plan_bucket((("weight", (32, 64)),), VsaConfig(bundle=1)), 0, device)
    gradient_N = (torch.rand(2048, generator=torch.Generator().manual_seed(0)) * 2 - 1) * scale
    y_TK = bucket.encode(gradient_N.to(device), None, bucket.keys(0))
    packed_TP, energy_T, kept_T = kernels.quantize(y_TK)
    found = {"y": y_TK, "packed": packed_TP, "energy": energy_T}
    found["kept"] = torch.where(energy_T.isfinite(), kept_T, 0.0)
    for dtype in (torch.float32, torch.bfloat16):
        decoded_N = torch.empty(2048, dtype=dtype, device=device)
        bucket.decode_(decoded_N, None, bucket.keys(0), y_TK)
        found[f"decoded to {dtype}"] = decoded_N.nan_to_num(nan=-7)
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in torch's rotation, by numpy
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e20, 3e38])
def test_triton_has_the_bits_of_torch_at_the_ends_of_float32(call: Call, scale: float) -> None:
    assert_same(call(there_and_back, "triton", scale), there_and_back("torch", scale))


def three_rows(bad: float, dtype: torch.dtype) -> list[Tensor]:
    """Rows as encoded, after the wire, and decoded; the second held a bad value."""
    kernels, device = load_kernels("triton", DEVICE["triton"]), DEVICE["triton"]
    bucket = kernels.for_bucket(plan_bucket((("weight", (3, 128)),), config(1, 128)), 0, device)
    gradient_N = torch.randn(384, device=device, dtype=dtype)
    gradient_N[131] = bad
    y_TK = bucket.encode(gradient_N, None, bucket.keys(0))
    packed_TP, energy_T, kept_T = kernels.quantize(y_TK)
    mean_TK = kernels.mean(Packed(packed_TP[None], level(energy_T, kept_T)[None], (3, 128)))
    bucket.decode_(gradient_N, None, bucket.keys(0), mean_TK)
    return [y_TK.cpu(), mean_TK.cpu(), gradient_N.view(3, 128).cpu()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_reaches_its_whole_row_and_no_other(
    call: Call, bad: float, dtype: torch.dtype
) -> None:
    for found in call(three_rows, bad, dtype):
        assert found[[0, 2]].isfinite().all()
        assert not found[1].isfinite().any()


def test_a_bucket_without_compressed_parameters_stays_as_it_is(call: Call) -> None:
    case = config(2, 128), [(5,), (3, 3)]
    mine = call(passes_of, "triton", *case)
    assert mine["y"].shape == (0, 128)
    assert (mine["decoded lanes"] == -7).all()
    assert_same(mine, passes_of("torch", *case))


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-m", "tests.hopper"], Path(__file__).parent.parent
    compiled = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stdout.split() == [
        "_decode",
        "_encode",
        "_mean",
        "_quantize",
        "_quantize_sparsely",
        "_rotate",
    ]


def archive(backend: str, dtype: torch.dtype) -> tuple[bytes, dict[str, Tensor]]:
    """An archive's bytes, and what they become."""
    compressor = VSAGradientCompressor(replace(config(2, 128), backend=backend))  # type: ignore[arg-type]
    gradients = {str(shape): made(*shape).to(DEVICE[backend], dtype) for shape in [(40, 33), (3,), (7, 200)]}
    compressed = compressor.compress(gradients, 2**40)
    back = compressor.decompress(compressed, DEVICE[backend])
    return compressed.to_bytes(), {name: gradient.cpu() for name, gradient in back.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_archives_are_the_same_wherever_they_are_written_and_read(call: Call, dtype: torch.dtype) -> None:
    (mine, back), (reference, expected) = call(archive, "triton", dtype), archive("torch", dtype)
    assert mine == reference
    assert_same(back, expected)
