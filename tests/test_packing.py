"""Packing is lossless: trits to bytes, packets to bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vsa_ddp.cost import digits_per_lane
from vsa_ddp.packing import (
    Packet,
    pack_digits,
    pack_packet,
    pack_trits,
    packet_bytes,
    unpack_digits,
    unpack_packet,
    unpack_trits,
)


def random_trits(num_trits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (num_trits,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@given(st.lists(st.integers(-1, 1), max_size=200))
def test_unpacking_inverts_packing(trits: list[int]) -> None:
    trits_K = torch.tensor(trits, dtype=torch.int8)
    packed = pack_trits(trits_K)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-len(trits) // 5),)
    assert torch.equal(unpack_trits(packed, len(trits)), trits_K.float())


def test_every_byte_is_base_three_least_significant_trit_first() -> None:
    packed = pack_trits(torch.tensor([1, 0, -1, -1, 0, -1], dtype=torch.int8))
    assert packed.tolist() == [2 + 3 * 1 + 9 * 0 + 27 * 0 + 81 * 1, 0 + 3 + 9 + 27 + 81]


def test_all_243_bytes_survive() -> None:
    packed = torch.arange(243, dtype=torch.uint8)
    assert torch.equal(pack_trits(unpack_trits(packed, 5 * 243).to(torch.int8)), packed)


def test_packing_refuses_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"must be int8, got torch\.int32"):
        pack_trits(torch.zeros(5, dtype=torch.int32))


@pytest.mark.parametrize("num_trits", [4, 11])
def test_unpacking_refuses_a_wrong_number_of_bytes(num_trits: int) -> None:
    with pytest.raises(ValueError, match=f"{num_trits} trits take"):
        unpack_trits(torch.zeros(2, dtype=torch.uint8), num_trits)


@given(
    num_blocks=st.integers(0, 3),
    num_exact=st.integers(0, 9),
    num_scales=st.integers(0, 9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_message_survives_its_packet(num_blocks: int, num_exact: int, num_scales: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    message = Packet(
        pack_trits(random_trits(num_blocks * 128).view(num_blocks, 128)),
        torch.randn(num_blocks, generator=generator).bfloat16(),
        torch.randn(num_scales, generator=generator).bfloat16(),
        torch.randn(num_exact, generator=generator).to(dtype),
    )
    packet = pack_packet(message)
    assert packet.shape[0] % 8 == 0
    assert packet_bytes(message) == packet.shape[0]
    like = Packet(*(torch.zeros_like(part) for part in vars(message).values()))
    arrived = vars(unpack_packet(packet, like))
    for name, part in vars(message).items():
        assert arrived[name].dtype == part.dtype
        assert torch.equal(arrived[name], part)


@given(num_packets=st.integers(1, 3), num_blocks=st.integers(0, 3), num_exact=st.integers(1, 9))
def test_several_packets_are_packed_as_one_by_one(num_packets: int, num_blocks: int, num_exact: int) -> None:
    packets = [
        Packet(
            pack_trits(random_trits(num_blocks * 128, seed).view(num_blocks, 128)),
            torch.arange(num_blocks).bfloat16() + seed,
            torch.zeros(0, dtype=torch.bfloat16),
            torch.randn(num_exact),
        )
        for seed in range(num_packets)
    ]
    together = Packet(*(torch.stack(parts) for parts in zip(*(vars(p).values() for p in packets), strict=True)))
    packed = pack_packet(together)
    assert torch.equal(packed, torch.stack([pack_packet(p) for p in packets]))
    arrived = unpack_packet(packed, like=packets[0])
    for name, part in vars(together).items():
        assert torch.equal(vars(arrived)[name], part)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 64, 1024])
@pytest.mark.parametrize("num_trits", [1, 26, 27, 1000])
def test_summed_digits_are_the_sums_of_trits(num_ranks: int, num_trits: int) -> None:
    trits = [random_trits(3 * num_trits, seed=rank).view(3, -1) for rank in range(min(num_ranks, 8))]
    trits += trits[-1:] * (num_ranks - len(trits))
    lanes = torch.stack([pack_digits(t, num_ranks) for t in trits]).sum(0)
    assert torch.equal(unpack_digits(lanes, num_trits, num_ranks), torch.stack(trits).sum(0).float())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("trit", [-1, 1])
def test_digits_hold_the_extremes(num_ranks: int, trit: int) -> None:
    trits = torch.full((1, 500), trit, dtype=torch.int8)
    lanes = pack_digits(trits, num_ranks) * num_ranks
    assert torch.equal(unpack_digits(lanes, 500, num_ranks), torch.full((1, 500), float(trit * num_ranks)))
    assert (lanes >= 0).all()


@pytest.mark.parametrize(("num_ranks", "bits"), [(2, 2.4), (4, 5.1), (8, 7.5), (64, 15.8)])
def test_bits_per_trit_received_from_a_ring_all_reduce(num_ranks: int, bits: float) -> None:
    received = 2 * (num_ranks - 1) / num_ranks * 64 / digits_per_lane(num_ranks)
    assert received == pytest.approx(bits, abs=0.06)
