"""A wire gives every rank the bits that one process would compute from all messages."""

import gc
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import lockstep
from tests.ranks import run_ranks
from vsa_ddp.hypervector import rotate, unpack_keys
from vsa_ddp.kernels import TorchKernels, load_kernels
from vsa_ddp.stats import ByteCounter, Totals
from vsa_ddp.ternary import dequantize, level, quantize
from vsa_ddp.wires import WIRES, AllGather, AllReduce, Courier, Mean, Message, Rounds, TwoShot, Wire
from vsa_ddp.wires.link import CHUNK_BYTES, Link
from vsa_ddp.wires.shards import joined, shards

BLOCKS, BLOCK, EXACT, SCALES = 8, 1024, 11, 7
SIGMA = torch.linspace(0.0, 2.0, BLOCKS)  # from not known yet to twice too large
SHARED = [AllReduce(), AllGather(shared_sigma=True)]
ALL = [*WIRES.values(), AllGather(shared_sigma=True)]


def message(rank: int, dtype: torch.dtype, bucket: int = 0, blocks: int = BLOCKS) -> Message:
    generator = torch.Generator().manual_seed(100 * bucket + rank)
    keys = torch.Generator().manual_seed(bucket)
    return Message(
        TorchKernels(),
        torch.randn(blocks, BLOCK, generator=generator),
        torch.randn(EXACT, generator=generator).to(dtype),
        torch.rand(SCALES, generator=generator),
        SIGMA if blocks == BLOCKS else torch.ones(blocks),
        torch.randint(-(2**31), 2**31, (blocks, BLOCK // 32), generator=keys, dtype=torch.int32),
    )


def rounded(y_TK: torch.Tensor) -> torch.Tensor:
    """As it arrives: trits at the rows' own levels."""
    trits_TK, energy_T, kept_T = quantize(y_TK)
    return dequantize(trits_TK, level(energy_T, kept_T).bfloat16())


def reference(wire: Wire, messages: list[Message]) -> Mean:
    world_size, first = len(messages), messages[0]
    y_TK, energy_T, kept_T = torch.zeros_like(first.rows), torch.zeros_like(first.sigma_T), torch.zeros(BLOCKS)
    scales_S, exact_E = torch.zeros(SCALES), torch.zeros(EXACT)
    for m in messages:
        if wire in SHARED:
            trits_TK, energy, kept = quantize(m.rows, m.sigma_T)
            y_TK += trits_TK
            energy_T += energy.bfloat16()
            kept_T += kept.bfloat16()
        else:
            y_TK += rounded(m.rows)
        scales_S += m.scales_S.bfloat16()
        exact_E += m.exact_E
    exact_E, scales_S = (exact_E / world_size).to(first.exact_E.dtype), scales_S / world_size
    if wire in SHARED:
        y_TK = dequantize(y_TK, level(energy_T, kept_T)) / world_size
        return Mean(y_TK, exact_E, scales_S, (energy_T / (world_size * BLOCK)).sqrt())
    y_TK /= world_size
    if isinstance(wire, TwoShot):
        keys_TK = unpack_keys(first.keys_TC)
        y_TK = rotate(rounded(rotate(y_TK * keys_TK))) * keys_TK
        scales_S = scales_S.bfloat16().float()
    return Mean(y_TK, exact_E, scales_S)


def exchange(
    rank: int, world_size: int, wires: list[Wire], dtype: torch.dtype, nodes: list[list[int]] | None, as_rank: list[int]
) -> list[list[Mean]]:
    """Three buckets on the wire at once, by each wire."""
    results = []
    for wire in wires:
        courier, counter = Courier(dist.group.WORLD, torch.device("cpu"), wire, nodes), ByteCounter()
        under_way = [courier.carry(message(as_rank[rank], dtype, b), courier.link(counter)) for b in range(3)]
        for future, _ in under_way:
            future.wait()
        means = [receive() for _, receive in under_way]
        results.append([replace(mean, rows=TorchKernels().mean(mean.rows)) for mean in means])
    return results


def assert_same(mean: Mean, expected: Mean, summed_by_network: bool, others: Mean) -> None:
    for name, value in vars(expected).items():
        mine = getattr(mean, name)
        if value is None:
            assert mine is None
        elif name == "exact_E" and summed_by_network:
            # summed in float64, and by the others in float32: a unit in the last place, the same on all ranks
            torch.testing.assert_close(mine, value, rtol=0, atol=1e-2 if value.dtype == torch.bfloat16 else 1e-6)
            assert torch.equal(mine, others.exact_E)
        else:
            assert torch.equal(mine, value), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_gets_the_bits_of_the_reference(tmp_path: Path, world_size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(exchange, world_size, tmp_path, ALL, dtype, None, list(range(world_size)))
    for bucket in range(3):
        messages = [message(rank, dtype, bucket) for rank in range(world_size)]
        for index, wire in enumerate(ALL):
            expected = reference(wire, messages)
            for results in ranks:
                mean = results[index][bucket]
                assert_same(mean, expected, isinstance(wire, AllReduce), ranks[0][index][bucket])


def node_mean(messages: list[Message]) -> Message:
    """One message for a node: the exact mean of its ranks', in rank order."""
    first = messages[0]

    def mean(name: str) -> torch.Tensor:
        total = torch.zeros_like(getattr(first, name), dtype=torch.float32)
        for m in messages:
            total += getattr(m, name)
        return (total / len(messages)).to(getattr(first, name).dtype)

    return Message(first.kernels, mean("rows"), mean("exact_E"), mean("scales_S"), first.sigma_T, first.keys_TC)


@pytest.mark.parametrize(
    "nodes",
    [
        [[0, 1], [2, 3]],
        [[0, 2], [1, 3]],
        [[0, 1], [3, 2]],
        [[2, 0], [1, 3]],
        [[0, 1, 2, 3]],
        [[0, 1, 2], [3, 4, 5]],
        [[0, 1], [2, 3], [4, 5]],
    ],
)
def test_nodes_are_ranks_with_their_members_mean(tmp_path: Path, nodes: list[list[int]]) -> None:
    world_size = sum(map(len, nodes))
    ranks = run_ranks(exchange, world_size, tmp_path, ALL, torch.float32, nodes, list(range(world_size)))
    for bucket in range(3):
        # summed in the order of the ranks, whatever the order in which they are given
        members = sorted(sorted(node) for node in nodes)
        messages = [node_mean([message(rank, torch.float32, bucket) for rank in node]) for node in members]
        for index, wire in enumerate(ALL):
            expected = reference(wire, messages)
            for results in ranks:
                mean = results[index][bucket]
                assert_same(mean, expected, isinstance(wire, AllReduce), ranks[0][index][bucket])


def test_with_a_shared_sigma_the_order_of_the_ranks_changes_no_bit(tmp_path: Path) -> None:
    orders = [list(range(4)), [2, 0, 3, 1]]
    both = [run_ranks(exchange, 4, tmp_path, SHARED, torch.float32, None, order)[0] for order in orders]
    (reduced, gathered), (reduced_again, gathered_again) = both
    for bucket in range(3):
        for name in ("rows", "sigma_T", "scales_S"):
            values = [getattr(m[bucket], name) for m in (reduced, gathered, reduced_again, gathered_again)]
            assert all(torch.equal(value, values[0]) for value in values), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_every_backend_finds_the_same_mean_however_few_rows_a_rank_has(world_size: int, blocks: int) -> None:
    for wire in ALL:
        means = []
        for kernels in (TorchKernels(), load_kernels("numba", torch.device("cpu"))):
            messages = [
                replace(message(rank, torch.float32, blocks=blocks), kernels=kernels) for rank in range(world_size)
            ]
            means.append(kernels.mean(lockstep.exchange(wire, messages, ByteCounter()).rows))
        assert torch.equal(*means), wire


def uneven(rank: int, world_size: int) -> list[list[Mean]]:
    """Six buckets through a wire of two rounds, each rank pausing where it likes."""
    courier, counter = Courier(dist.group.WORLD, torch.device("cpu"), TwoShot()), ByteCounter()
    pause = random.Random(rank)
    found = []
    for _ in range(4):
        under_way = []
        for bucket in range(6):
            time.sleep(pause.random() * 0.01)
            under_way.append(courier.carry(message(rank, torch.float32, bucket), courier.link(counter)))
            dist.all_reduce(torch.ones(3))  # the user's own collectives go on in the user's group
        for future, _ in under_way:
            future.wait()
        found.append([receive() for _, receive in under_way])
    return found


def test_buckets_in_flight_are_not_mixed_up(tmp_path: Path) -> None:
    messages = [[message(rank, torch.float32, bucket) for rank in range(3)] for bucket in range(6)]
    expected = [reference(TwoShot(), m) for m in messages]
    for rounds in run_ranks(uneven, 3, tmp_path):
        for means in rounds:
            for mean, right in zip(means, expected, strict=True):
                assert torch.equal(mean.rows, right.rows)


def traffic(rank: int, world_size: int, wire: Wire, blocks: int, nodes: list[list[int]] | None) -> tuple[Totals, int]:
    courier, counter = Courier(dist.group.WORLD, torch.device("cpu"), wire, nodes), ByteCounter()
    future, _ = courier.carry(message(rank, torch.float32, blocks=blocks), courier.link(counter))
    future.wait()
    return counter.totals, blocks * BLOCK


@pytest.mark.parametrize(
    ("wire", "bits"),
    [
        ("all_reduce", {2: 2.4, 4: 5.1, 8: 7.5}),
        ("all_gather", {2: 1.6, 4: 4.8, 8: 11.2}),
        ("two_shot", {2: 1.6, 4: 2.4, 8: 2.8}),
    ],
)
def test_bits_per_trit_are_those_of_theory(tmp_path: Path, wire: str, bits: dict[int, float]) -> None:
    for world_size, expected in bits.items():
        totals, num_trits = run_ranks(traffic, world_size, tmp_path, WIRES[wire], 64, None)[0]
        assert 8 * totals.received_bytes / num_trits == pytest.approx(expected, rel=0.05)
        assert totals.sent_bytes == totals.received_bytes


def test_the_bytes_handed_over_are_the_formats(tmp_path: Path) -> None:
    gathered, reduced, shot = (run_ranks(traffic, 2, tmp_path, w, BLOCKS, None)[0][0] for w in WIRES.values())
    # 1639 bytes of trits, 16 of levels, 14 of scales, 44 of exact elements, each filled to a multiple of 8
    seal = 16
    assert gathered.wire_bytes == gathered.sent_bytes == seal + 1640 + 16 + 16 + 48
    # 27 digits to a lane; two floats per block, and the scales and exact elements, as float64
    assert reduced.wire_bytes == seal + 8 * -(-BLOCKS * BLOCK // 27) + 8 * (2 * BLOCKS + SCALES + EXACT)
    # a shard has half of it all, rounded up: two of them go out, and one comes back
    shard = seal + 824 + 8 + 8 + 24
    assert (shot.wire_bytes, shot.sent_bytes) == (3 * shard, 2 * shard)


def test_nodes_send_their_shard_alone(tmp_path: Path) -> None:
    flat, _ = run_ranks(traffic, 2, tmp_path, AllGather(), 64, None)[0]
    node, _ = run_ranks(traffic, 4, tmp_path, AllGather(), 64, [[0, 1], [2, 3]])[0]
    assert node.wire_bytes == pytest.approx(flat.wire_bytes / 2, rel=0.01)
    # y out and back in float32, half of it each time to the other rank and half to itself
    assert node.local_bytes == pytest.approx(1.5 * 4 * 64 * BLOCK, rel=0.01)


def chunked(rank: int, world_size: int, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    link = Link(dist.group.WORLD, ByteCounter())
    numbers = torch.arange(world_size * num_bytes, dtype=torch.int64).view(world_size, -1)
    packets = ((numbers * (rank + 3)) % 251).to(torch.uint8)
    future, gathered = link.all_gather(packets[0].contiguous())
    future.wait()
    future, exchanged = link.all_to_all(packets)
    future.wait()
    return gathered, exchanged


@pytest.mark.parametrize("num_bytes", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 7])
def test_long_messages_arrive_in_parts_as_they_were(tmp_path: Path, num_bytes: int) -> None:
    world_size = 3
    numbers = torch.arange(world_size * num_bytes, dtype=torch.int64).view(world_size, -1)
    sent = [((numbers * (rank + 3)) % 251).to(torch.uint8) for rank in range(world_size)]
    for rank, (gathered, exchanged) in enumerate(run_ranks(chunked, world_size, tmp_path, num_bytes)):
        for other in range(world_size):
            assert torch.equal(gathered[other], sent[other][0])
            assert torch.equal(exchanged[other], sent[other][rank])


@pytest.mark.parametrize("num_rows", [0, 1, 5, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_shards_join_again(num_rows: int, num_ranks: int) -> None:
    rows = torch.randn(num_rows, 3)
    assert torch.equal(joined(shards(rows, num_ranks), num_rows), rows)


def test_the_second_rounding_adds_the_noise_of_theory() -> None:
    """NMSE 0.2348 of the mean, unbiased over fresh keys, whatever the ranks had in common."""
    alike = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(1))
    errors, total = [], torch.zeros_like(alike)
    first = rounded(alike)  # all ranks have the same: the mean is as far from Gaussian as can be
    for draw in range(200):
        generator = torch.Generator().manual_seed(draw)
        keys = torch.randint(-(2**31), 2**31, (4, BLOCK // 32), generator=generator, dtype=torch.int32)
        m = Message(TorchKernels(), alike, torch.zeros(EXACT), torch.zeros(SCALES), torch.zeros(BLOCKS), keys)
        mean = reference(TwoShot(), [m, m])
        total += mean.rows / 200
        errors.append(((mean.rows - first).square().sum() / first.square().sum()).item())
    assert sum(errors) / 200 == pytest.approx(0.2348, rel=0.02)
    # what is left after 200 draws is the noise's 1 / 200
    assert ((total - first).square().sum() / first.square().sum()).item() == pytest.approx(0.2348 / 200, rel=0.1)


def test_a_shared_sigma_twice_wrong_still_gives_an_unbiased_mean() -> None:
    y_TK = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    for sigma, nmse in ((0.0, 0.571), (0.5, 0.310), (0.8, 0.247), (1.0, 0.235), (1.25, 0.253), (2.0, 0.553)):
        trits_TK, energy_T, kept_T = quantize(y_TK, torch.full((200,), sigma))
        estimate_TK = dequantize(trits_TK, level(energy_T, kept_T))
        error = ((estimate_TK - y_TK).square().sum() / y_TK.square().sum()).item()
        assert error == pytest.approx(nmse, rel=0.02)
        assert ((estimate_TK * y_TK).sum(1) / energy_T).sub(1).abs().max() < 1e-5


def test_nothing_kept_decodes_to_zero_and_not_finite_stays() -> None:
    energy_T = torch.tensor([1.0, 0.0, float("nan"), float("inf")])
    levels_T = level(energy_T, torch.tensor([0.0, 0.0, float("nan"), float("nan")]))
    assert levels_T[:2].tolist() == [0.0, 0.0]
    assert not levels_T[2:].isfinite().any()


def broken(rank: int, world_size: int) -> tuple[str, str]:
    """A wire whose second round fails, with another bucket waiting behind it."""

    both_sent = threading.Event()

    class Broken(TwoShot):
        def exchange(self, message: Message, link: Link) -> Rounds:
            yield next(super().exchange(message, link))
            both_sent.wait()
            raise MemoryError("no memory for the second round")

    courier, counter = Courier(dist.group.WORLD, torch.device("cpu"), Broken()), ByteCounter()
    futures = [courier.carry(message(rank, torch.float32, bucket), courier.link(counter))[0] for bucket in range(2)]
    both_sent.set()
    errors = []
    for future in futures:
        with pytest.raises(Exception, match="no memory for the second round") as error:
            future.wait()
        errors.append(error.type.__name__)
    with pytest.raises(RuntimeError, match="an earlier exchange of gradients failed: no memory") as error:
        courier.carry(message(rank, torch.float32), courier.link(counter))
    return errors[0], str(error.value)


def test_after_a_failure_nothing_more_is_sent(tmp_path: Path) -> None:
    run_ranks(broken, 2, tmp_path)


def dropped(rank: int, world_size: int) -> tuple[int, int]:
    before = threading.active_count()
    for _ in range(3):
        courier = Courier(dist.group.WORLD, torch.device("cpu"), TwoShot())
        future, receive = courier.carry(message(rank, torch.float32), courier.link(ByteCounter()))
        future.wait()
        receive()
        del courier, future, receive
        gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    return before, threading.active_count()


def test_a_couriers_thread_ends_with_it(tmp_path: Path) -> None:
    for before, after in run_ranks(dropped, 2, tmp_path):
        assert after == before
