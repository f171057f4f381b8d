"""Each stage of the codec keeps its promise for whatever values, shapes and dtypes come along."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.test_codec import CPU
from vsa_ddp import hypervector, ternary
from vsa_ddp.codec import Codec
from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels import Kernels, encode, load_kernels
from vsa_ddp.layout import plan_bucket
from vsa_ddp.packing import pack_digits, pack_trits, unpack_digits, unpack_trits
from vsa_ddp.whitening import Whitening, mean_squares

BLOCK = 128
values = st.one_of(
    st.just(0.0),
    st.floats(2.0**-33, 2.0**33, width=32),
    st.floats(-(2.0**33), -(2.0**-33), width=32),
)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """One to three rows: a few drawn values, and zeros, one value or noise for the rest."""
    num_rows = draw(st.integers(1, 3))
    drawn = draw(st.lists(values, max_size=12))
    rest = draw(st.sampled_from(["zeros", "ones", "noise"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    y_TK = {
        "zeros": torch.zeros(num_rows, BLOCK),
        "ones": torch.ones(num_rows, BLOCK),
        "noise": torch.randn(num_rows, BLOCK, generator=generator),
    }[rest]
    y_TK.view(-1)[torch.randperm(y_TK.numel(), generator=generator)[: len(drawn)]] = torch.tensor(drawn).float()
    return y_TK


def backends() -> list[Kernels]:
    return [load_kernels(name, CPU) for name in ("torch", "numba")]


@given(y_TK=rows(), step=st.integers(0, 2**63 - 1), seed=st.integers(0, 2**63 - 1), stream=st.integers(0, 2**32 - 1))
def test_binding_is_a_change_of_signs_that_undoes_itself(y_TK: Tensor, step: int, seed: int, stream: int) -> None:
    counter_T1 = torch.arange(len(y_TK))[:, None]
    words = hypervector.key_words(counter_T1, torch.full_like(counter_T1, stream), step, seed)
    keys_TK = hypervector.unpack_keys(words)
    assert torch.equal(keys_TK.abs(), torch.ones_like(y_TK))
    bound = hypervector.bind(y_TK, keys_TK)
    assert torch.equal(bound.abs(), y_TK.abs())
    assert torch.equal(hypervector.unbind(bound, keys_TK), y_TK)


@given(y_TK=rows())
def test_rotation_keeps_lengths_and_undoes_itself(y_TK: Tensor) -> None:
    peak_T = y_TK.abs().amax(1)
    # rows are rounded to units of at most 2 K peak / 2**24, half of one in each of K elements
    rounding_T = BLOCK**0.5 * BLOCK / 2**24 * peak_T
    for kernels in backends():
        rotated_TK = kernels.rotate(y_TK)
        lengths_T = rotated_TK.double().norm(dim=1)
        assert ((lengths_T - y_TK.double().norm(dim=1)).abs() <= 1.01 * rounding_T + 1e-6 * lengths_T).all()
        # the greatest of a rotated row is at most sqrt(K) times that of the row
        error_T = (kernels.rotate(rotated_TK) - y_TK).double().norm(dim=1)
        assert (error_T <= 1.01 * (1 + BLOCK**0.5) * rounding_T + 1e-6 * lengths_T).all()


@given(y_TK=rows())
def test_trits_are_signs_of_what_is_loud_and_the_level_gives_the_row_its_own_length(y_TK: Tensor) -> None:
    trits_TK, energy_T, kept_T = ternary.quantize(y_TK)
    assert trits_TK.dtype == torch.int8
    assert ((trits_TK == 0) | (trits_TK == y_TK.sign())).all()
    sigma_T1 = y_TK.double().square().mean(1, keepdim=True).sqrt()
    loud = y_TK.abs() > ternary.THRESHOLD * sigma_T1 * (1 + 1e-5)
    quiet = y_TK.abs() < ternary.THRESHOLD * sigma_T1 * (1 - 1e-5)
    assert trits_TK[loud].all()
    assert not trits_TK[quiet].any()
    estimate_TK = ternary.dequantize(trits_TK, ternary.level(energy_T, kept_T)).double()
    energy = y_TK.double().square().sum(1)
    torch.testing.assert_close((estimate_TK * y_TK).sum(1), energy, rtol=1e-5, atol=0)
    for kernels in backends():
        packed_TP, *sums = kernels.quantize(y_TK)
        assert torch.equal(packed_TP, pack_trits(trits_TK))
        assert torch.equal(unpack_trits(packed_TP, BLOCK), trits_TK.float())
        assert torch.equal(torch.stack(sums), torch.stack([energy_T, kept_T]))


@given(
    trits=st.lists(st.lists(st.integers(-1, 1), min_size=7, max_size=7), min_size=1, max_size=9),
    more=st.integers(0, 60),
)
def test_digits_of_any_trits_add_up_without_a_carry(trits: list[list[int]], more: int) -> None:
    num_ranks = len(trits) + more
    trits_WK = torch.tensor(trits, dtype=torch.int8)
    lanes = torch.cat([pack_digits(row[None], num_ranks) for row in trits_WK]).sum(0)
    lanes += more * pack_digits(torch.zeros(1, 7, dtype=torch.int8), num_ranks)[0]
    assert torch.equal(unpack_digits(lanes[None], 7, num_ranks)[0], trits_WK.sum(0).float())


@given(y_TK=rows(), exponent=st.integers(-10, 10))
def test_scales_are_positive_bounded_and_do_not_depend_on_the_gradients_size(y_TK: Tensor, exponent: int) -> None:
    layout = plan_bucket((("weight", tuple(y_TK.shape)),), VsaConfig(min_numel=1, rotation_block=BLOCK))
    found = []
    for gradient in (y_TK, y_TK * 2.0**exponent):
        scales_S = mean_squares(layout, gradient.flatten())
        for kernels in backends():
            assert torch.equal(kernels.for_bucket(layout, 0, CPU).mean_squares(gradient.flatten()), scales_S)
        whitening = Whitening(0.0)
        whitening.update(layout, scales_S)
        found.append(whitening.factors(layout))
    factors_S = found[0]
    assert torch.equal(*found)
    assert factors_S.isfinite().all()
    # 0.001 of the matrix's mean square at least; at most all of it in one of R rows or C columns
    assert (factors_S >= 0.0316).all()
    assert (factors_S <= 1.001 * max(y_TK.shape) ** 0.5).all()


@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple),
    bundle=st.integers(1, 20),
    block=st.sampled_from([128, 256, 1024]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**63 - 1),
)
def test_decoding_is_the_mirror_of_encoding(
    shape: tuple[int, ...], bundle: int, block: int, dtype: torch.dtype, seed: int
) -> None:
    """<decode(v), x> = <v, encode(x)> for every gradient x and hypervector v: that is what unbiased rests on."""
    config = VsaConfig(bundle=bundle, rotation_block=block, min_numel=1, seed=seed, whiten=False)
    layout = plan_bucket((("weight", shape),), config)
    generator = torch.Generator().manual_seed(seed % 2**32)
    x_N = torch.randn(layout.slices[0].numel, generator=generator).to(dtype)
    v_TK = torch.randn(layout.num_dims // block, block, generator=generator)
    for kernels in backends():
        codec = Codec(layout, config, Whitening(0.9), CPU, kernels)
        keys = codec.keys(3)
        gradient, exact_E = codec.encode(x_N, keys)
        decoded_N = torch.empty_like(x_N, dtype=torch.float64)
        codec.decode_(decoded_N, v_TK.clone(), exact_E.double(), keys)
        y_TK = encode(gradient).double()
        size = v_TK.norm().item() * (y_TK.norm().item() + x_N.double().norm().item())
        difference = (decoded_N * x_N.double()).sum() - (v_TK * y_TK).sum()
        # both rotations round to units of 2 K peak / 2**24, a peak being less than 5 standard deviations or so
        assert difference.abs() <= 10 * block / 2**24 * size
