"""The codec meets its theory at every size and dtype."""

import pytest
import torch

from vsa_ddp.codec import Codec, gain
from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels import TorchKernels, encode
from vsa_ddp.layout import BucketLayout, plan_bucket
from vsa_ddp.rates import unbiased_nmse
from vsa_ddp.ternary import NMSE, dequantize, level, quantize
from vsa_ddp.whitening import Whitening

CPU = torch.device("cpu")
SIZES = [1024, 1025, 3000, 4096, 5000, 16385, 100_003, 1_000_000]


def make_codec(shape: tuple[int, ...], config: VsaConfig, whitening: Whitening | None = None) -> Codec:
    layout = plan_bucket((("weight", shape),), config)
    return Codec(layout, config, whitening or Whitening(0.9), CPU, TorchKernels())


def round_trip(codec: Codec, gradients: list[torch.Tensor], step: int) -> list[torch.Tensor]:
    """What a single rank gets back, its levels rounded to bfloat16 as on the wire."""
    keys = codec.keys(step)
    bucket_N = torch.cat([g.flatten() for g in gradients])
    rows, exact_E = codec.encode(bucket_N, keys)
    trits_TK, energy_T, kept_T = quantize(encode(rows))
    decoded_N = torch.full_like(bucket_N, torch.nan)
    codec.decode_(decoded_N, dequantize(trits_TK, level(energy_T, kept_T).bfloat16()), exact_E, keys)
    parts = decoded_N.split([g.numel() for g in gradients])
    return [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]


def theory(layout: BucketLayout) -> float:
    """Noise over signal of the unbiased decode of elements of equal variance.

    A dimension that n_d elements share gives each the crosstalk of the n_d - 1 others. The quantiser adds 0.2348 times
    the mean energy of the rotation block. The Walsh functions of a prefix of p dimensions span a power of two of them,
    and so does the quantiser's error: a last block that is not full counts as one of that size. Full slots: B * 1.2348
    - 1.
    """
    (s,) = layout.compressed
    block = layout.rotation_block
    noise = 0.0
    for start in range(0, s.num_dims, block):
        sharers = [-(-(s.numel - d) // s.num_dims) for d in range(start, start + block)]  # n_d
        filled = sum(n > 0 for n in sharers)
        noise += sum(n * (n - 1) for n in sharers)
        noise += NMSE * sum(sharers) ** 2 / (1 << (filled - 1).bit_length()) if filled else 0.0
    return noise / s.numel


def measured_nmse(codec: Codec, numel: int, draws: int) -> float:
    generator = torch.Generator().manual_seed(numel)
    error = energy = 0.0
    for step in range(draws):
        x = torch.randn(1, numel, generator=generator)
        error += (round_trip(codec, [x], step)[0] - x).square().sum().item()
        energy += x.square().sum().item()
    return error / energy


@pytest.mark.parametrize("bundle", [1, 4, 16])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("gain_name", ["unbiased", "shrunk"])
def test_the_error_of_a_gaussian_bucket_is_the_theorys(numel: int, bundle: int, gain_name: str) -> None:
    config = VsaConfig(bundle=bundle, gain=gain_name, whiten=False)  # type: ignore[arg-type]
    codec = make_codec((1, numel), config)
    v, a = theory(codec.layout), gain(config)
    assert measured_nmse(codec, numel, 1 + 200_000 // numel) == pytest.approx((1 - a) ** 2 + a**2 * v, rel=0.02)


@pytest.mark.parametrize("numel", [1, 2, 3, 31, 1000, 1023])
def test_fewer_elements_than_a_block_travel_exactly(numel: int) -> None:
    assert measured_nmse(make_codec((1, numel), VsaConfig()), numel, 3) == 0


@pytest.mark.parametrize("numel", [100, 500, 1000])
def test_a_block_that_is_not_full_meets_the_theory_too(numel: int) -> None:
    codec = make_codec((1, numel), VsaConfig(min_numel=1, whiten=False))
    # a hundred Walsh functions are not quite Gaussian
    assert measured_nmse(codec, numel, 400) == pytest.approx(theory(codec.layout), rel=0.02)


def test_full_slots_have_the_stated_noise() -> None:
    config = VsaConfig(bundle=4)
    assert theory(make_codec((4, 4096), config).layout) == pytest.approx(unbiased_nmse(4))
    assert gain(VsaConfig(bundle=4, gain="shrunk")) == pytest.approx(0.8098 / 4, rel=1e-3)


@pytest.mark.parametrize("bundle", [1, 4, 16])
@pytest.mark.parametrize(("giant", "squared_bias"), [(0.0, 0.0), (0.5, 5e-4)])
def test_the_mean_over_many_keys_is_the_input(bundle: int, giant: float, squared_bias: float) -> None:
    x_BK = torch.randn(bundle, 1024, generator=torch.Generator().manual_seed(0))
    # One element with a fifth of all energy: signs and one Walsh-Hadamard transform are not quite a random rotation
    if giant:
        x_BK[0, 1] = giant * x_BK.square().sum().sqrt()
    draws = 4000 // bundle
    copies = x_BK[:, None].expand(bundle, draws, 1024)  # one rotation block each, with keys of its own
    codec = make_codec((1, copies.numel()), VsaConfig(bundle=bundle, whiten=False))
    decoded = round_trip(codec, [copies.reshape(1, -1)], 0)[0].view_as(copies)
    error = (decoded.mean(1) - x_BK).square().sum() / x_BK.square().sum()
    # the noise of one draw over the number of draws, nothing else; a bias of 5 % alone would add 2.5e-3
    assert error == pytest.approx(unbiased_nmse(bundle) / draws, rel=0.25, abs=squared_bias)
    projection = (decoded.mean(1) * x_BK).sum() / x_BK.square().sum()
    assert projection == pytest.approx(1.0, abs=0.005 * bundle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_parameters_come_back_as_they_were(dtype: torch.dtype) -> None:
    config = VsaConfig(bundle=4)
    layout = plan_bucket((("norm", (33,)), ("weight", (64, 64)), ("scale", ()), ("tiny", (3, 3))), config)
    gradients = [torch.randn(s.shape).to(dtype) for s in layout.slices]
    decoded = round_trip(Codec(layout, config, Whitening(0.9), CPU, TorchKernels()), gradients, 3)
    for s, gradient, back in zip(layout.slices, gradients, decoded, strict=True):
        assert back.dtype == dtype
        assert torch.equal(gradient, back) == (not s.num_dims)


def test_a_parameters_bits_do_not_depend_on_its_bucket() -> None:
    config = VsaConfig(bundle=4)
    parts = (("a", (64, 100)), ("b", (50, 90)), ("c", (128, 128)))
    gradients = {name: torch.randn(shape) for name, shape in parts}
    decoded = {}
    for order in (parts, parts[::-1], parts[:1], parts[1:2], parts[2:]):
        codec = Codec(plan_bucket(order, config), config, Whitening(0.9), CPU, TorchKernels())
        for (name, _), back in zip(order, round_trip(codec, [gradients[n] for n, _ in order], 5), strict=True):
            assert torch.equal(decoded.setdefault(name, back), back)


def test_whitening_puts_the_noise_where_the_gradient_is() -> None:
    config = VsaConfig(bundle=4)
    scale = torch.logspace(-1, 0, 64)[:, None] * torch.logspace(-1, 0, 256)[None, :]
    whitening = Whitening(0.9)
    codec = make_codec((64, 256), config, whitening)
    generator = torch.Generator().manual_seed(0)
    relative = []
    for _ in range(2):  # without scales, then with them
        x = [torch.randn(64, 256, generator=generator) * scale for _ in range(40)]
        noise = torch.stack([round_trip(codec, [g], step)[0] - g for step, g in enumerate(x)]).square().mean(0).sqrt()
        relative.append((noise / scale).log10().std().item())
        whitening.update(codec.layout, torch.stack([codec.mean_squares(g.flatten()) for g in x]).mean(0))
        codec.refresh_factors()
    assert relative[0] > 0.3  # the same noise everywhere, over two decades of signal
    assert relative[1] < 0.1  # noise in proportion


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_stays_visible_and_in_its_parameter(bad: float) -> None:
    config = VsaConfig(bundle=4)
    codec = Codec(plan_bucket((("a", (64, 64)), ("b", (64, 64))), config), config, Whitening(0.9), CPU, TorchKernels())
    gradients = [torch.randn(64, 64), torch.randn(64, 64)]
    gradients[0][3, 3] = bad
    decoded = round_trip(codec, gradients, 0)
    assert not decoded[0][3, 3].isfinite()
    assert decoded[1].isfinite().all()
