"""Block codes: of every n elements the largest, as theory has it, by every wire that carries them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import digest, gradients, loss_of, net
from tests.ranks import run_ranks
from vsa_ddp import VsaConfig, learning_rate_factor
from vsa_ddp.compressor import VSAGradientCompressor
from vsa_ddp.hypervector import rotate
from vsa_ddp.rates import NMSES, code_bits, unbiased_nmse
from vsa_ddp.sparse import GROUP, diagonals, pack_codes, quantize_sparsely, row_bytes, unpack_codes
from vsa_ddp.ternary import dequantize, level

SPARSITIES = (2, 4, 8, 16, 32, 64, 128)


def estimate(y_TK: Tensor, sparsity: int) -> Tensor:
    """What is decoded of rotated rows. Shapes: (T, K) -> (T, K)."""
    codes_TS, energy_T, kept_T = quantize_sparsely(y_TK, sparsity)
    return dequantize(unpack_codes(pack_codes(codes_TS, sparsity), sparsity), level(energy_T, kept_T))


def noise(y_TK: Tensor, sparsity: int) -> float:
    """Over signal, of what is decoded."""
    return ((estimate(y_TK, sparsity) - y_TK).square().sum() / y_TK.square().sum()).item()


@given(sparsity=st.sampled_from(SPARSITIES), num_rows=st.integers(0, 3), groups=st.sampled_from([1, 2, 8]))
def test_block_codes_survive_packing(sparsity: int, num_rows: int, groups: int) -> None:
    num = groups * GROUP
    generator = torch.Generator().manual_seed(groups)
    codes_TS = torch.randint(0, 2 * sparsity, (num_rows, num), generator=generator).to(torch.uint8)
    packed_TP = pack_codes(codes_TS, sparsity)
    assert packed_TP.shape == (num_rows, row_bytes(num * sparsity, sparsity))
    assert packed_TP.nbytes * 8 == codes_TS.numel() * code_bits(sparsity)
    trits_TnS = unpack_codes(packed_TP, sparsity)[:, diagonals(num * sparsity, sparsity, packed_TP.device)]
    assert torch.equal(trits_TnS.abs().sum(1), torch.ones(num_rows, num))
    place_TS = trits_TnS.abs().argmax(1)
    negative_TS = trits_TnS.sum(1) < 0
    assert torch.equal((place_TS + sparsity * negative_TS).to(torch.uint8), codes_TS)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_largest_of_a_block_is_kept_with_its_sign(sparsity: int) -> None:
    y_TK = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1))
    codes_TS, energy_T, kept_T = quantize_sparsely(y_TK, sparsity)
    trits_TK = unpack_codes(pack_codes(codes_TS, sparsity), sparsity)
    where_nS = diagonals(1024, sparsity, y_TK.device)
    kept = y_TK[:, where_nS].abs().amax(1)
    assert torch.equal((trits_TK * y_TK)[:, where_nS].sum(1), kept)
    torch.testing.assert_close(energy_T, y_TK.square().sum(1))
    torch.testing.assert_close(kept_T, kept.sum(1))


def test_a_code_has_an_element_of_every_run_and_a_row_every_element_once() -> None:
    assert diagonals(32, 4, torch.device("cpu"))[:, 0].tolist() == [0, 9, 18, 27]
    assert diagonals(128, 16, torch.device("cpu"))[:, 0].tolist() == [9 * run % 8 + 8 * run for run in range(8)] + [
        8 * run + (run + 1) % 8 for run in range(8, 16)
    ]
    for sparsity in SPARSITIES:
        where_nS = diagonals(1024, sparsity, torch.device("cpu"))
        assert torch.equal(where_nS.flatten().sort()[0], torch.arange(1024))
        assert torch.equal(where_nS // (1024 // sparsity), torch.arange(sparsity)[:, None].expand_as(where_nS))


@pytest.mark.parametrize("sparsity", [2, 8, 64, 128])
@pytest.mark.parametrize("num_cols", [128, 256, 512])
def test_a_row_that_prevails_costs_no_more_than_others(sparsity: int, num_cols: int) -> None:
    """Of a matrix of less than 1024 columns: the rotated block repeats itself then, up to signs."""
    generator = torch.Generator().manual_seed(3)
    x_TK = torch.randn(400, 1024, generator=generator)
    x_TK[:, num_cols:] = 0
    assert noise(rotate(x_TK), sparsity) == pytest.approx(NMSES[sparsity], rel=0.07)


def test_of_equal_sizes_the_first_is_kept() -> None:
    y_TK = torch.tensor([[1.0, -2.0, 2.0, -0.0]]).repeat_interleave(8, 1)
    codes_TS, *_ = quantize_sparsely(y_TK, 4)
    assert codes_TS.tolist() == [[1 + 4] * 8]
    codes_TS, *_ = quantize_sparsely(torch.zeros(1, 32), 4)
    assert codes_TS.tolist() == [[0] * 8]


def mean_of_the_largest(sparsity: int) -> float:
    """Of so many standard Gaussians' sizes, by integrating 1 - P(all below x)."""
    x = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    return float(torch.trapezoid(1 - torch.erf(x / math.sqrt(2)) ** sparsity, x))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_noise_is_that_of_theory(sparsity: int) -> None:
    assert NMSES[sparsity] == pytest.approx(sparsity / mean_of_the_largest(sparsity) ** 2 - 1, rel=1e-3)
    y_TK = torch.randn(400, 1024, generator=torch.Generator().manual_seed(2))
    assert noise(y_TK, sparsity) == pytest.approx(NMSES[sparsity], rel=0.02)
    unbiased_T = (estimate(y_TK, sparsity) * y_TK).sum(1) / y_TK.square().sum(1)
    assert unbiased_T.sub(1).abs().max() < 1e-5


def test_block_codes_have_less_noise_than_bundles_at_as_many_bits() -> None:
    for sparsity in SPARSITIES:
        bundle = 1.6 * sparsity / code_bits(sparsity)
        assert unbiased_nmse(1, sparsity) < 0.6 * (bundle * 1.2348 - 1)
    assert learning_rate_factor(bundle=2, sparsity=16) == pytest.approx((2 * (1 + NMSES[16])) ** 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_reaches_its_whole_row_and_no_other(bad: float) -> None:
    y_TK = torch.randn(3, 256)
    y_TK[1, 7] = bad
    estimate_TK = estimate(y_TK, 16)
    assert estimate_TK[[0, 2]].isfinite().all()
    assert not estimate_TK[1].isfinite().any()


@pytest.mark.parametrize("value", [0, 3, 256, 2.0])
def test_a_sparsity_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be a power of two in 1\.\.128, got"):
        VsaConfig(sparsity=value)


def test_settings_that_sparsity_does_not_go_with_are_refused() -> None:
    with pytest.raises(ValueError, match="sums every trit and saves nothing where most are zero, but sparsity is 4"):
        VsaConfig(sparsity=4, wire="all_reduce")
    with pytest.raises(ValueError, match="rotation_block must be at least 8 times the sparsity of 32"):
        VsaConfig(sparsity=32, rotation_block=128)
    with pytest.raises(ValueError, match="files hold all trits"):
        VSAGradientCompressor(VsaConfig(sparsity=2))


def decoded_run(rank: int, world_size: int, steps: int, settings: dict[str, Any]) -> tuple[list[str], float]:
    """Digests of the first five steps; cosine of the mean of all gradients, of one batch, with plain DDP's."""
    plain, model = DDP(net()), DDP(net(), bucket_cap_mb=0.05)
    vsa_ddp.register(model, bundle=1, **settings)
    loss_of(plain, 0, rank).backward()
    digests, total = [], 0.0
    for step in range(steps):
        model.zero_grad()
        loss_of(model, 0, rank).backward()
        total = total + gradients(model)["hidden.weight"]
        if step < 5:
            digests.append(digest(gradients(model).values()))
    expected = gradients(plain)["hidden.weight"]
    cosine = torch.nn.functional.cosine_similarity(total.flatten(), expected.flatten(), dim=0)
    return digests, cosine.item()


@pytest.mark.parametrize("settings", [{"wire": "all_gather"}, {"wire": "two_shot"}, {"ranks_per_node": 2}])
def test_the_hook_is_unbiased_and_the_same_on_all_ranks_and_backends(tmp_path: Path, settings: dict[str, Any]) -> None:
    world_size = 4 if "ranks_per_node" in settings else 2
    ranks = run_ranks(decoded_run, world_size, tmp_path, 200, {**settings, "sparsity": 16})
    assert all(digests == ranks[0][0] for digests, _ in ranks)
    # noise over signal 2.7 of a rank, and of the second rounding 2.7 of all that comes before it, over 200 draws; and
    # ranks' gradients that partly cancel leave a mean weaker than its noise
    assert ranks[0][1] > (0.95 if settings.get("wire") == "two_shot" else 0.98)
    torch_too = run_ranks(decoded_run, world_size, tmp_path, 5, {**settings, "sparsity": 16, "backend": "torch"})
    assert torch_too[0][0] == ranks[0][0]
