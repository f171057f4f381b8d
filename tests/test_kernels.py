"""The backends calculate the same bits, at any size, in any dtype, in any number of threads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels import Gradient, Kernels, Packed, Received, Summed, TorchKernels, load_kernels
from vsa_ddp.kernels.torch_kernels import TorchBucket
from vsa_ddp.layout import plan_bucket
from vsa_ddp.ternary import level

CPU = torch.device("cpu")
SHAPES = [(70, 33), (5,), (1, 5000), (3000, 3), (12, 4, 5, 6), (257, 129)]


def passes(
    kernels: Kernels,
    config: VsaConfig,
    dtype: torch.dtype = torch.float32,
    num_ranks: int = 2,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Every pass of a backend over a bucket of awkward parameters, from the same gradients."""
    block = config.rotation_block
    layout = plan_bucket(tuple((str(index), shape) for index, shape in enumerate(shapes)), config)
    generator = torch.Generator().manual_seed(0)
    gradient_N = torch.randn(sum(s.numel for s in layout.slices), generator=generator).to(device, dtype)
    factors_S = torch.rand(layout.num_factors, generator=generator).to(device) + 0.5
    bucket = kernels.for_bucket(layout, 2**40 + config.seed, device)
    keys = bucket.keys(2**33 + 3)
    found = {"scales": bucket.mean_squares(gradient_N)}
    found |= {"y": bucket.encode(gradient_N, factors_S, keys), "unwhitened": bucket.encode(gradient_N, None, keys)}
    found["rotated"] = kernels.rotate(found["y"])
    rows = Gradient(bucket, gradient_N, factors_S, keys, (layout.num_dims // block, block))
    packed_TP, found["energy"], found["kept"] = kernels.quantize(rows)
    found["packed"], found["packed from floats"] = packed_TP, kernels.quantize(found["y"])[0]
    sigma_T = torch.linspace(0, 2, len(packed_TP)).to(device)
    found["at sigma"] = kernels.quantize(found["y"], sigma_T)[0]
    found["lanes"], _, found["kept at sigma"] = kernels.quantize_to_digits(rows, sigma_T, num_ranks)
    found["lanes from floats"] = kernels.quantize_to_digits(found["y"], sigma_T, num_ranks)[0]
    levels_T = level(found["energy"], found["kept"])
    packets = torch.stack([packed_TP, packed_TP.flip(0), found["at sigma"]])
    with_gaps = torch.cat([packets.flatten(1), packets.flatten(1)[:, :7]], 1)[:, : packed_TP.numel()].view_as(packets)
    received: dict[str, Received] = {
        "floats": found["y"],
        "own levels": Packed(with_gaps, torch.stack([levels_T, levels_T.flip(0), levels_T]).bfloat16(), rows.shape),
        "shared levels": Packed(with_gaps, levels_T, rows.shape),
        "lanes": Summed(found["lanes"] * num_ranks, levels_T, num_ranks, rows.shape),
    }
    for name, mean in received.items():
        found[f"mean of {name}"] = kernels.mean(mean)
        for suffix, factors, gain in (("", factors_S, 0.7), (", plain", None, 1.0)):
            decoded_N = found[f"decoded {name}{suffix}"] = torch.full_like(gradient_N, -7)
            bucket.decode_(decoded_N, factors, keys, mean, gain)
    return {name: tensor.cpu() for name, tensor in found.items()}


def sparse_passes(kernels: Kernels, config: VsaConfig, device: torch.device = CPU) -> dict[str, Tensor]:
    """The passes of block codes, from rows with ties and zeros in them and from a gradient."""
    n, block = config.sparsity, config.rotation_block
    layout = plan_bucket((("weight", (70, 129)),), config)
    gradient_N = torch.randn(70 * 129, generator=torch.Generator().manual_seed(0)).to(device)
    bucket = kernels.for_bucket(layout, 0, device)
    keys = bucket.keys(1)
    y_TK = bucket.encode(gradient_N, None, keys)
    rows = Gradient(bucket, gradient_N, None, keys, (len(y_TK), block))
    found: dict[str, Tensor] = {}
    for name, source in (("gradient", rows), ("floats", y_TK), ("ties", y_TK.sign() * (y_TK.abs() > 1))):
        packed, energy, kept = kernels.quantize_sparsely(source, n)
        found |= {f"packed {name}": packed, f"energy of {name}": energy, f"kept of {name}": kept}
    packets = torch.stack([found[f"packed {name}"] for name in ("gradient", "ties", "floats")])
    with_gaps = torch.cat([packets.flatten(1), packets.flatten(1)[:, :7]], 1)[:, : packets[0].numel()].view_as(packets)
    levels_T = level(found["energy of gradient"], found["kept of gradient"])
    mean = Packed(with_gaps, torch.stack([levels_T, levels_T.flip(0), levels_T]).bfloat16(), rows.shape, n)
    found["mean"], found["decoded"] = kernels.mean(mean), torch.full_like(gradient_N, -7)
    bucket.decode_(found["decoded"], None, keys, mean, 0.7)
    return {name: tensor.cpu() for name, tensor in found.items()}


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    for name, expected in reference.items():
        assert mine[name].dtype == expected.dtype, name
        assert torch.equal(mine[name], expected), name


@pytest.mark.parametrize("bundle", [1, 3, 16, 64])
@pytest.mark.parametrize("block", [128, 512, 1024, 2048])
@pytest.mark.parametrize("num_ranks", [1, 2, 64])
def test_numba_has_the_bits_of_torch(bundle: int, block: int, num_ranks: int) -> None:
    config = VsaConfig(bundle=bundle, rotation_block=block)
    numba = passes(load_kernels("numba", CPU), config, num_ranks=num_ranks)
    assert_same(numba, passes(TorchKernels(), config, num_ranks=num_ranks))


@pytest.mark.parametrize(("block", "sparsity"), [(128, 2), (128, 16), (512, 64), (1024, 4), (1024, 8), (2048, 128)])
def test_numba_has_the_block_codes_of_torch(block: int, sparsity: int) -> None:
    config = VsaConfig(bundle=2, rotation_block=block, sparsity=sparsity)
    assert_same(sparse_passes(load_kernels("numba", CPU), config), sparse_passes(TorchKernels(), config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numba_has_the_bits_of_torch_in_every_dtype(dtype: torch.dtype) -> None:
    config = VsaConfig(bundle=4)
    assert_same(passes(load_kernels("numba", CPU), config, dtype), passes(TorchKernels(), config, dtype))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_no_bit_depends_on_the_threads(backend: str) -> None:
    config = VsaConfig(bundle=1, rotation_block=128)
    alone = passes(load_kernels(backend, CPU), config)
    with threads(3):
        assert_same(passes(load_kernels(backend, CPU), config), alone)


@pytest.mark.parametrize("bundle", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_pieces_a_parameter_passes_in(bundle: int, dtype: torch.dtype) -> None:
    whole = passes(TorchKernels(), VsaConfig(bundle=bundle), dtype)
    for size in (4000, 333, 1):
        kernels = TorchKernels()
        kernels.for_bucket = partial(TorchBucket, piece=size)  # type: ignore[method-assign]
        assert_same(passes(kernels, VsaConfig(bundle=bundle), dtype), whole)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e20, 3e38])
def test_backends_agree_at_the_ends_of_float32(scale: float) -> None:
    layout = plan_bucket((("weight", (64, 64)),), VsaConfig(bundle=1))
    gradient_N = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 2 - 1) * scale
    y_TK = [
        bucket.encode(gradient_N, None, bucket.keys(0))
        for bucket in (load_kernels(name, CPU).for_bucket(layout, 0, CPU) for name in ("torch", "numba"))
    ]
    assert torch.equal(*y_TK)
    if 1e-30 <= scale <= 1e20:
        assert y_TK[0].double().norm().item() == pytest.approx(gradient_N.double().norm().item(), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_value_that_is_not_finite_reaches_its_whole_row_and_no_other(backend: str, bad: float) -> None:
    kernels = load_kernels(backend, CPU)
    y_TK = torch.randn(3, 1024)
    y_TK[1, 7] = bad
    rotated_TK = kernels.rotate(y_TK)
    packed_TP, energy_T, kept_T = kernels.quantize(rotated_TK)
    mean_TK = kernels.mean(Packed(packed_TP[None], level(energy_T, kept_T)[None], (3, 1024)))
    for found in (rotated_TK, mean_TK):
        assert found[[0, 2]].isfinite().all()
        assert not found[1].isfinite().any()


def test_auto_takes_what_is_there_and_a_missing_backend_is_an_error() -> None:
    assert load_kernels("auto", CPU).name == "numba"
    assert load_kernels("torch", CPU).name == "torch"
    with pytest.raises(ValueError, match='backend="triton" is for cuda and gradients are on cpu; use backend="auto"'):
        load_kernels("triton", CPU)
    with pytest.raises(ValueError, match='backend="numba" is for cpu and gradients are on cuda'):
        load_kernels("numba", torch.device("cuda"))


def test_without_a_compiler_auto_is_torch_on_cuda_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        assert load_kernels("auto", torch.device("cuda")).name == "torch"
    assert [record.getMessage()[:26] for record in caplog.records] == ["triton needs a C compiler,"]


def test_without_numba_auto_is_torch_and_asking_for_it_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load_kernels("auto", CPU).name == "torch"
    with pytest.raises(ValueError, match=r'needs numba, which is not installed: pip install "vsa-ddp\[numba\]"'):
        load_kernels("numba", CPU)
