"""A wire gives every rank the bits that one process would compute from all messages."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from vsa_ddp.stats import ByteCounter
from vsa_ddp.ternary import dequantize, level, quantize, quantize_at
from vsa_ddp.wires import WIRES, AllGather, AllReduce, Link, Mean, Message, Wire

BLOCKS, BLOCK, EXACT, SCALES = 8, 1024, 11, 7
SIGMA = torch.linspace(0.0, 2.0, BLOCKS)  # from not known yet to twice too large
SHARED = [AllReduce(), AllGather(shared_sigma=True)]
ALL = [*WIRES.values(), AllGather(shared_sigma=True)]


def message(rank: int, dtype: torch.dtype) -> Message:
    generator = torch.Generator().manual_seed(rank)
    return Message(
        torch.randn(BLOCKS, BLOCK, generator=generator),
        SIGMA,
        torch.randn(EXACT, generator=generator).to(dtype),
        torch.rand(SCALES, generator=generator),
    )


def reference(wire: Wire, world_size: int, dtype: torch.dtype) -> Mean:
    messages = [message(rank, dtype) for rank in range(world_size)]
    y_TK, energy_T, kept_T = torch.zeros(BLOCKS, BLOCK), torch.zeros(BLOCKS), torch.zeros(BLOCKS)
    scales_S, exact_E = torch.zeros(SCALES), torch.zeros(EXACT)
    for m in messages:
        if wire in SHARED:
            trits_TK, energy, kept = quantize_at(m.y_TK, m.sigma_T)
            y_TK += trits_TK
            energy_T += energy.bfloat16()
            kept_T += kept.bfloat16()
        else:
            trits_TK, levels_T = quantize(m.y_TK)
            y_TK += dequantize(trits_TK, levels_T.bfloat16())
        scales_S += m.scales_S.bfloat16()
        exact_E += m.exact_E
    sigma_T = None
    if wire in SHARED:
        y_TK = dequantize(y_TK, level(energy_T, kept_T))
        sigma_T = (energy_T / (world_size * BLOCK)).sqrt()
    return Mean(y_TK / world_size, sigma_T, (exact_E / world_size).to(dtype), scales_S / world_size)


def exchange(rank: int, world_size: int, dtype: torch.dtype) -> list[tuple[Mean, int]]:
    results = []
    for wire in ALL:
        counter = ByteCounter()
        future, receive = wire.exchange(message(rank, dtype), Link(dist.group.WORLD, counter))
        future.wait()
        results.append((receive(), counter.wire_bytes))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_gets_the_bits_of_the_reference(tmp_path: Path, world_size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(exchange, world_size, tmp_path, dtype)
    for index, wire in enumerate(ALL):
        expected = vars(reference(wire, world_size, dtype))
        for results in ranks:
            mean = vars(results[index][0])
            for name, value in expected.items():
                if value is None:
                    assert mean[name] is None
                elif name == "exact_E" and isinstance(wire, AllReduce):
                    # the network sums these floats in its own order: a unit in the last place, the same on all ranks
                    torch.testing.assert_close(
                        mean[name], value, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
                    )
                    assert torch.equal(mean[name], vars(ranks[0][index][0])[name])
                else:
                    assert torch.equal(mean[name], value), (wire, name)


def test_wires_with_a_shared_sigma_give_each_others_bits(tmp_path: Path) -> None:
    reduced, gathered = (results[0] for results in run_ranks(exchange, 4, tmp_path, torch.float32)[0][1:3])
    assert torch.equal(reduced.y_TK, gathered.y_TK)
    assert torch.equal(reduced.sigma_T, gathered.sigma_T)
    assert torch.equal(reduced.scales_S, gathered.scales_S)


def test_the_bytes_handed_over_are_the_formats(tmp_path: Path) -> None:
    (_, gathered), (_, reduced), _ = run_ranks(exchange, 2, tmp_path, torch.float32)[0]
    # 1639 bytes of trits, 16 of levels, 14 of scales, 44 of exact elements, each filled to a multiple of 8
    assert gathered == 1640 + 16 + 16 + 48
    # 27 digits to a lane; two floats per block, and the scales and exact elements as float32
    assert reduced == 8 * -(-BLOCKS * BLOCK // 27) + 4 * (2 * BLOCKS + SCALES + EXACT)


def test_a_shared_sigma_twice_wrong_still_gives_an_unbiased_mean() -> None:
    y_TK = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    for sigma, nmse in ((0.0, 0.571), (0.5, 0.310), (0.8, 0.247), (1.0, 0.235), (1.25, 0.253), (2.0, 0.553)):
        trits_TK, energy_T, kept_T = quantize_at(y_TK, torch.full((200,), sigma))
        estimate_TK = dequantize(trits_TK, level(energy_T, kept_T))
        error = ((estimate_TK - y_TK).square().sum() / y_TK.square().sum()).item()
        assert error == pytest.approx(nmse, rel=0.02)
        assert ((estimate_TK * y_TK).sum(1) / energy_T).sub(1).abs().max() < 1e-5


def test_nothing_kept_decodes_to_zero_and_not_finite_stays() -> None:
    energy_T = torch.tensor([1.0, 0.0, float("nan"), float("inf")])
    levels_T = level(energy_T, torch.tensor([0.0, 0.0, float("nan"), float("nan")]))
    assert levels_T[:2].tolist() == [0.0, 0.0]
    assert not levels_T[2:].isfinite().any()
