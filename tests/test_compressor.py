"""Named gradients outside DDP: what comes back, in which bytes, from which input, in how much memory."""

import hashlib
import io
import itertools
import math
import os
import re
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.memory import held_bytes, kept_bytes
from tests.test_codec import make_codec, round_trip, theory
from tests.test_kernels import threads
from vsa_ddp import CompressedGradients, CompressorStats, VsaConfig, VSAGradientCompressor
from vsa_ddp.archive import DTYPES, plan
from vsa_ddp.config import Backend
from vsa_ddp.rates import unbiased_nmse

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NMSE = unbiased_nmse(1)


def made(*shape: int, salt: int = 0) -> Tensor:
    """The same gradient on every machine: no generator, whose normals may depend on the processor."""
    x = torch.arange(math.prod(shape)).mul(7919).add(salt).remainder(2003).sub(1001).float().div(1001)
    return (x * x.abs()).view(shape)


def model() -> dict[str, Tensor]:
    """Gradients of matrices, a convolution, small and empty parameters; one matrix has rows for several threads."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (40_000, 8),
        "conv.weight": (32, 4, 3, 3),
        "conv.bias": (32,),
        "head.weight": (100, 77),
        "scale": (),
        "nothing": (0, 5),
    }
    return {name: made(*shape, salt=salt) for salt, (name, shape) in enumerate(shapes.items())}


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = (x.double().flatten() / x.double().abs().max() for x in (a, b))
    return (a @ b / (a.norm() * b.norm())).item()


def there_and_back(gradient: Tensor, step: int = 0, **chosen: Any) -> Tensor:
    compressor = VSAGradientCompressor(VsaConfig(**{"bundle": 4, **chosen}))
    return compressor.decompress(compressor.compress({"weight": gradient}, step))["weight"]


# What comes back


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(
    ("shape", "chosen", "dims", "to_beat"),
    [
        ((64, 128), {"bundle": 1}, 8192, 0.24),
        ((32, 64), {"bundle": 1}, 8192, 0.45),
        ((32, 64), {"bundle": 4, "rotation_block": 512}, 512, 0.08),
        ((16, 20), {"bundle": 1, "rotation_block": 128, "min_numel": 1}, 512, 0.19),
    ],
)
def test_cosines_are_the_theorys_and_twice_those_to_beat(
    shape: tuple[int, int], chosen: dict[str, int], dims: int, to_beat: float, whiten: bool
) -> None:
    compressor = VSAGradientCompressor(VsaConfig(whiten=whiten, **chosen))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    cosines = []
    for step in range(40):
        gradient = torch.randn(shape, generator=generator)
        compressed = compressor.compress({"weight": gradient}, step)
        cosines.append(cosine(compressor.decompress(compressed)["weight"], gradient))
    assert 0 < compressor.compressed_dim <= dims
    layout, _ = plan(compressed.entries[0], compressed.config)
    mean = sum(cosines) / len(cosines)
    # a row's scale is measured from its own few elements: some 1 / 20 of noise in it
    assert mean == pytest.approx(1 / math.sqrt(1 + theory(layout)), rel=0.03 if whiten else 0.02)
    assert mean > 1.9 * to_beat


def test_it_is_the_hooks_codec() -> None:
    gradient = torch.randn(64, 64)
    config = VsaConfig(bundle=4, whiten=False)
    expected = round_trip(make_codec((64, 64), config), [gradient], 7)[0]
    assert torch.equal(there_and_back(gradient, 7, bundle=4, whiten=False), expected)


@pytest.mark.parametrize("varied", ["step", "seed"])
def test_errors_average_out_over_steps_and_over_senders_with_seeds_of_their_own(varied: str) -> None:
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    draws = 200
    back = [
        there_and_back(gradient, **{"step": 3, "bundle": 4, "whiten": False, varied: number})  # type: ignore[arg-type]
        for number in range(draws)
    ]
    error = (sum(back) / draws - gradient).square().sum() / gradient.square().sum()
    assert error == pytest.approx(unbiased_nmse(4) / draws, rel=0.15)


@pytest.mark.parametrize(("shape", "slots"), [((64, 64), 4), ((32, 32), 1), ((48, 64), 3)])
def test_the_shrunk_gain_has_the_least_error_for_the_slots_that_are_filled(shape: tuple[int, int], slots: int) -> None:
    error = energy = 0.0
    for step in range(40):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        back = there_and_back(gradient, step, bundle=4, gain="shrunk", whiten=False)
        error += (back - gradient).square().sum().item()
        energy += gradient.square().sum().item()
    noise = unbiased_nmse(slots)
    assert error / energy == pytest.approx(noise / (1 + noise), rel=0.03)


shapes = st.lists(st.integers(0, 24), max_size=4).map(tuple)
named = st.dictionaries(
    st.text(max_size=8), st.tuples(shapes, st.sampled_from(list(DTYPES.values()))), min_size=1, max_size=4
)


@settings(max_examples=150)
@given(
    what=named,
    bundle=st.integers(1, 9),
    block=st.sampled_from([128, 1024]),
    min_numel=st.sampled_from([1, 64]),
    whiten=st.booleans(),
    gain=st.sampled_from(["unbiased", "shrunk"]),
    step=st.integers(0, 2**63 - 1),
    exponent=st.integers(-20, 10),
)
def test_names_shapes_dtypes_and_order_come_back(
    what: dict[str, tuple[tuple[int, ...], torch.dtype]],
    bundle: int,
    block: int,
    min_numel: int,
    whiten: bool,
    gain: Any,
    step: int,
    exponent: int,
) -> None:
    config = VsaConfig(bundle=bundle, rotation_block=block, min_numel=min_numel, whiten=whiten, gain=gain)
    gradients = {name: made(*shape).mul(2.0**exponent).to(dtype) for name, (shape, dtype) in what.items()}
    compressed = VSAGradientCompressor(config).compress(gradients, step)
    back = VSAGradientCompressor().decompress(CompressedGradients.from_bytes(compressed.to_bytes()))
    here = VSAGradientCompressor(config).decompress(compressed)
    assert list(back) == list(gradients)
    for entry, packet in zip(compressed.entries, compressed.packets, strict=True):
        gradient, found = gradients[entry.name], back[entry.name]
        assert (found.dtype, found.shape) == (gradient.dtype, gradient.shape)
        assert torch.equal(found, here[entry.name])
        assert found.isfinite().all()
        if entry.exponent is None:
            assert torch.equal(found, gradient)
        else:
            assert packet.numel() < gradient.nbytes


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e-300),
        (torch.float64, 1e300),
        (torch.float32, 1e-40),
        (torch.float32, 1e-25),
        (torch.float32, 1e25),
        (torch.float32, 8e37),
        (torch.bfloat16, 8e37),
        (torch.float16, 1.6e4),
        (torch.float16, 1e-5),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_gradients_at_the_ends_of_their_dtype_lose_no_more_than_others(
    backend: Backend, dtype: torch.dtype, scale: float
) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-4, 4)
    gradient = (x * scale).to(dtype)
    back = there_and_back(gradient, bundle=1, backend=backend)
    assert back.isfinite().all()
    assert cosine(back, gradient) == pytest.approx(1 / math.sqrt(1 + NMSE), rel=0.02)


def test_zeros_come_back_as_zeros() -> None:
    assert torch.equal(there_and_back(torch.zeros(64, 64)), torch.zeros(64, 64))


def test_names_with_equal_keys_do_not_meet() -> None:
    names = ("plumless", "buckeroo")
    assert len({zlib.crc32(name.encode()) for name in names}) == 1, "keys are drawn from the CRC-32 of the name"
    gradients = {name: torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    compressor = VSAGradientCompressor(VsaConfig(bundle=1))
    back = compressor.decompress(compressor.compress(gradients, 0))
    for a, b in itertools.product(names, repeat=2):
        expected = 1 / math.sqrt(1 + NMSE) if a == b else 0.0
        # 4096 elements: five standard deviations of a cosine of independent ones
        assert cosine(back[a], gradients[b]) == pytest.approx(expected, abs=5 / 64)


# In which bytes


def digest_of_packets(backend: Backend) -> str:
    """Of the model in reverse order, each packet by name: what another process says of its own."""
    gradients = dict(reversed(model().items()))
    compressed = VSAGradientCompressor(VsaConfig(bundle=4, backend=backend)).compress(gradients, 5)
    packets = dict(zip(gradients, compressed.packets, strict=True))
    return hashlib.sha256(b"".join(packets[name].numpy().tobytes() for name in sorted(packets))).hexdigest()


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_another_process_on_another_kind_of_processor_writes_the_same_packets(backend: Backend) -> None:
    script = f"from tests.test_compressor import digest_of_packets; print(digest_of_packets({backend!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    other = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == digest_of_packets("torch")


def test_the_order_of_the_dict_changes_no_packet_and_comes_back() -> None:
    gradients = model()
    compressor = VSAGradientCompressor()
    forth, back = (compressor.compress(dict(order), 5) for order in (gradients.items(), reversed(gradients.items())))
    assert all(torch.equal(a, b) for a, b in zip(forth.packets, reversed(back.packets), strict=True))
    assert list(compressor.decompress(back)) == list(reversed(gradients))
    # a file has them by name: only the list in its header differs, and with it the checksum
    tail = sum(packet.numel() for packet in forth.packets) + 16
    assert forth.to_bytes()[-tail:-16] == back.to_bytes()[-tail:-16]


@pytest.mark.parametrize("bundle", [1, 4])
@pytest.mark.parametrize("whiten", [True, False])
def test_backends_and_threads_write_the_same_bytes(bundle: int, whiten: bool) -> None:
    found = set()
    for backend, number in itertools.product(("torch", "numba"), (1, 3)):
        config = VsaConfig(bundle=bundle, whiten=whiten, backend=backend)  # type: ignore[arg-type]
        with threads(number):
            found.add(VSAGradientCompressor(config).compress(model(), 5).to_bytes())
    assert len(found) == 1


def test_each_step_and_seed_has_keys_of_its_own() -> None:
    def packets(step: int, seed: int) -> bytes:
        config = VsaConfig(bundle=4, seed=seed)
        return VSAGradientCompressor(config).compress({"weight": made(64, 64)}, step).packets[0].numpy().tobytes()

    found = {packets(step, seed) for step, seed in itertools.product((0, 1, 2**32, 2**63 - 1), (0, 1, 2**63 - 1))}
    assert len(found) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_expands_and_a_file_is_smaller_than_torchs(dtype: torch.dtype) -> None:
    # thin ones too, whose scales outweigh their trits
    for shape in [(1024, 1), (1, 1024), (5000, 2), (2, 5000), (3,), (), (0, 7), (40, 30), (64, 64), (70_000,)]:
        gradients = {"weight": made(*shape).to(dtype)}
        compressed = VSAGradientCompressor().compress(gradients, 0)
        assert compressed.packets[0].numel() <= -(-gradients["weight"].nbytes // 8) * 8, shape
        torch.save(gradients, file := io.BytesIO())
        assert compressed.num_bytes < len(file.getvalue()), shape


@pytest.mark.parametrize(("bundle", "bits"), [(1, 1.6), (4, 0.4), (16, 0.1)])
def test_bytes_are_measured_and_near_the_nominal(tmp_path: Path, bundle: int, bits: float) -> None:
    compressor = VSAGradientCompressor(VsaConfig(bundle=bundle, whiten=False))
    assert compressor.get_compression_stats() == CompressorStats()
    size = 0
    for step in range(2):
        compressed = compressor.compress({"weight": made(1024, 2048), "bias": made(500)}, step)
        compressed.save(tmp_path / f"{step}.vsa")
        size += (tmp_path / f"{step}.vsa").stat().st_size
        assert compressed.num_bytes == (tmp_path / f"{step}.vsa").stat().st_size
    stats = compressor.get_compression_stats()
    assert stats.file_bytes == size
    assert stats.dense_bytes == 2 * 4 * (2**21 + 500)
    assert stats.compression == stats.dense_bytes / size
    assert (stats.num_elements, stats.num_exact, stats.calls) == (2 * (2**21 + 500), 1000, 2)
    assert compressor.compressed_dim == 2**21 // bundle
    # 205 bytes for 1024 trits, a level of two bytes for each; the exact bias; a header
    exact = 8 * (2000 + 300) / 2**21
    assert bits <= stats.bits_per_element <= bits * (207 / 204.8) * 1.001 + exact
    assert repr(compressed).startswith("CompressedGradients(2 gradients of step 1, ")


# From which input


def test_any_strides_and_parameters_are_taken_and_none_is_touched() -> None:
    base = made(64, 96)
    conv = made(16, 8, 3, 3).to(memory_format=torch.channels_last)
    gradients = {"turned": base.t(), "every other": base[:, ::2], "parameter": nn.Parameter(base), "conv": conv}
    gradients |= {"strided vector": base[:, 5], "expanded": base[:1].expand(64, 96)}
    before = {name: gradient.detach().clone() for name, gradient in gradients.items()}
    plain = {name: gradient.detach().contiguous() for name, gradient in gradients.items()}
    compressor = VSAGradientCompressor()
    assert compressor.compress(gradients, 1).to_bytes() == compressor.compress(plain, 1).to_bytes()
    assert all(torch.equal(gradients[name], before[name]) for name in gradients)


def test_an_archive_does_not_share_memory_with_the_gradients() -> None:
    gradients = model()
    compressor = VSAGradientCompressor()
    compressed = compressor.compress(gradients, 1)
    before = compressed.to_bytes()
    for gradient in [*gradients.values(), *compressor.decompress(compressed).values()]:
        gradient.fill_(7)
    assert compressed.to_bytes() == before


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        ({}, ValueError, "no gradients to compress; call backward first"),
        ([("weight", torch.ones(3))], TypeError, "must be a dict of tensors by name, got list"),
        ({1: torch.ones(3), "1": torch.ones(3)}, TypeError, r"named by strings, got the name 1; use str\("),
        ({"half \ud800": torch.ones(3)}, ValueError, "cannot be written in UTF-8; use another"),
        ({"weight": None}, TypeError, "gradient weight is a NoneType, not a tensor; leave out parameters without"),
        ({"weight": [1.0]}, TypeError, "gradient weight is a list, not a tensor"),
        ({"weight": torch.eye(3).to_sparse()}, TypeError, r"weight is sparse .* use \.to_dense\(\)"),
        ({"weight": torch.ones(3, dtype=torch.complex64)}, TypeError, r"torch\.complex64, .* use torch\.view_as_real"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, r"torch\.int64, .* float64, float32, .* \.float\(\)"),
        ({"weight": torch.ones(3).to(torch.float8_e4m3fn)}, TypeError, r"torch\.float8_e4m3fn, which is none of"),
    ],
)
def test_what_is_no_dict_of_dense_real_gradients_is_refused(gradients: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        VSAGradientCompressor().compress(gradients, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(64, 64), (5,)])
def test_a_value_that_is_not_finite_is_refused_by_name(bad: float, shape: tuple[int, ...]) -> None:
    gradients = {"good": made(64, 64), "layer.weight": made(*shape)}
    gradients["layer.weight"].view(-1)[[1, 3]] = bad
    compressor = VSAGradientCompressor()
    with pytest.raises(ValueError, match=r"layer\.weight has 2 values that are not finite, .* torch\.nan_to_num"):
        compressor.compress(gradients, 0)
    assert compressor.get_compression_stats().calls == 0


@pytest.mark.parametrize("step", [-1, 2**63, 1.0, True, None])
def test_an_impossible_step_is_refused(step: Any) -> None:
    with pytest.raises(ValueError, match=rf"step must be an int in 0\.\.{2**63 - 1} .*, got {step}"):
        VSAGradientCompressor().compress(model(), step)


def test_progress_is_told_after_each_gradient() -> None:
    gradients = model()
    sizes = list(itertools.accumulate(gradient.numel() for gradient in gradients.values()))
    compressor = VSAGradientCompressor()
    told: list[tuple[int, int]] = []
    compressed = compressor.compress(gradients, 0, lambda done, total: told.append((done, total)))
    compressor.decompress(compressed, progress=lambda done, total: told.append((done, total)))
    assert told == 2 * [(size, sizes[-1]) for size in sizes]


# In how much memory


def test_the_past_changes_no_bit_and_the_cache_can_be_cleared() -> None:
    used, fresh = VSAGradientCompressor(), VSAGradientCompressor()
    # the same names with other values, settings and shapes before
    used.compress({name: gradient * 100 for name, gradient in model().items()}, 0)
    used.decompress(VSAGradientCompressor(VsaConfig(bundle=1, seed=3)).compress(model(), 0))
    used.compress({"embed.weight": made(64, 64)}, 0)
    for _ in range(2):
        compressed = used.compress(model(), 1)
        assert compressed.to_bytes() == fresh.compress(model(), 1).to_bytes()
        expected = VSAGradientCompressor().decompress(compressed)
        assert all(torch.equal(found, expected[name]) for name, found in used.decompress(compressed).items())
        assert kept_bytes(used) > 0
        used.clear_cache()
        assert kept_bytes(used) == 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_largest_gradients_and_the_result(backend: Backend, dtype: torch.dtype) -> None:
    n = 2**20
    found = {}
    for count in (1, 4):
        gradients = {str(i): made(1024, 1024).to(dtype) for i in range(count)}
        compressor = VSAGradientCompressor(VsaConfig(bundle=4, backend=backend))
        compressed = compressor.compress(gradients, 0)  # compiles
        compressor.decompress(compressed)
        assert kept_bytes(compressor) <= 0.2 * count * n
        found[count] = (
            held_bytes(partial(compressor.compress, gradients, 1), CPU),
            held_bytes(partial(compressor.decompress, compressed), CPU),
        )
    # a float32 copy of one gradient, its packet in parts and whole, some rows; in torch operations also hypervectors
    # of 4 / B bytes per element each, keys of a bit and pieces of 2**18 elements
    most = (4 + 3 * 0.21 / 4) * n + 2**18
    if backend == "torch":
        most += (12 / 4 + 1 / 8) * n + 4 * 2**20
    for count, (compressing, decompressing) in found.items():
        assert compressing.left <= 1.02 * compressed.num_bytes * count / 4 + 2**15
        assert compressing.peak <= most + compressing.left
        assert decompressing.left == pytest.approx(count * n * dtype.itemsize, rel=0.02)
        assert decompressing.peak <= most + decompressing.left
    for one, four in zip(found[1], found[4], strict=True):
        assert four.peak - one.peak <= 1.1 * (four.left - one.left) + 2**16


# As it is documented


def test_the_pages_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "compressor.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/compressor.md", "exec"), {})
