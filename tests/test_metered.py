"""The training script's meter and the state's own count agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from launch import metered
from tests.models import loss_of, net
from tests.ranks import run_ranks
from vsa_ddp.wires import WIRES


def sizes(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[Any, int, int]:
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, bundle=4, **settings)
    loss_of(model, 0, rank).backward()
    before, metered_before = state.compression_stats(), metered.wire_bytes()
    for step in range(1, 20):
        loss_of(model, step, rank).backward()
        if step == 18:
            before_last = state.compression_stats()
    stats = state.compression_stats()
    assert stats.last_step_bytes == stats.wire_bytes - before_last.wire_bytes
    counted = stats.wire_bytes + stats.local_bytes - before.wire_bytes - before.local_bytes
    return stats, counted, metered.wire_bytes() - metered_before


def collectives_without_tensors(rank: int, world_size: int) -> tuple[list[object], list[torch.device], int]:
    everyone: list[object] = [None] * world_size
    dist.all_gather_object(everyone, {"rank": rank})
    dist.barrier()
    return everyone, dist.group.WORLD._device_types, metered.wire_bytes()


def test_object_collectives_and_barriers_go_through(tmp_path: Path) -> None:
    everyone, devices, wire_bytes = run_ranks(collectives_without_tensors, 2, tmp_path, backend="metered")[0]
    assert everyone == [{"rank": 0}, {"rank": 1}]
    assert [d.type for d in devices] == ["cpu"]
    assert wire_bytes > 0


@pytest.mark.parametrize("settings", [*({"wire": wire} for wire in WIRES), {"ranks_per_node": 2}])
def test_bytes_are_those_that_the_groups_were_handed(tmp_path: Path, settings: dict[str, Any]) -> None:
    stats, counted, handed = run_ranks(sizes, 4, tmp_path, settings, backend="metered")[0]
    # DDP itself sends its new bucket order, a few integers, once
    assert counted <= handed <= counted + 64
    num_parameters = sum(p.numel() for p in net().parameters())
    assert stats.dense_bytes == 20 * 4 * num_parameters
    assert stats.compression == stats.dense_bytes / stats.wire_bytes
    assert stats.bits_per_coordinate == 8 * stats.received_bytes / (20 * num_parameters)
    assert (stats.local_bytes > 0) == ("ranks_per_node" in settings)
    assert stats.steps == 20
