"""The training script's meter and the state's own count agree."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from launch import metered  # noqa: F401  (registers the "metered" backend)
from tests.models import loss_of, net
from tests.ranks import run_ranks


def sizes(rank: int, world_size: int) -> tuple[Any, int, int]:
    group = dist.group.WORLD
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, bundle=4)
    loss_of(model, 0, rank).backward()
    counted_before, metered_before = state.compression_stats().wire_bytes, group.wire_bytes
    for step in range(1, 20):
        loss_of(model, step, rank).backward()
    stats = state.compression_stats()
    return stats, stats.wire_bytes - counted_before, group.wire_bytes - metered_before


def collectives_without_tensors(rank: int, world_size: int) -> tuple[list[object], list[torch.device], int]:
    everyone: list[object] = [None] * world_size
    dist.all_gather_object(everyone, {"rank": rank})
    dist.barrier()
    return everyone, dist.group.WORLD._device_types, dist.group.WORLD.wire_bytes


def test_object_collectives_and_barriers_go_through(tmp_path: Path) -> None:
    everyone, devices, wire_bytes = run_ranks(collectives_without_tensors, 2, tmp_path, backend="metered")[0]
    assert everyone == [{"rank": 0}, {"rank": 1}]
    assert [d.type for d in devices] == ["cpu"]
    assert wire_bytes > 0


def test_bytes_are_those_that_the_group_was_handed(tmp_path: Path) -> None:
    stats, counted, handed = run_ranks(sizes, 2, tmp_path, backend="metered")[0]
    # DDP itself sends its new bucket order, a few integers, once
    assert counted <= handed <= counted + 64
    num_parameters = sum(p.numel() for p in net().parameters())
    assert stats.dense_bytes == 20 * 4 * num_parameters
    assert stats.compression == stats.dense_bytes / stats.wire_bytes
    assert stats.steps == 20
