"""What the hook keeps and holds: far less than a residual would, and in proportion to the model."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from benchmarks.codec_methods import Buckets, Ours
from benchmarks.memory import Held, held_bytes, kept_bytes
from tests.ranks import run_ranks
from vsa_ddp.config import Backend

CPU = torch.device("cpu")


def test_a_storage_is_counted_once_wherever_it_is_reached() -> None:
    class Owner:
        __slots__ = ("array", "call", "running", "tensors")

    def tensors() -> Iterator[object]:
        local = torch.zeros(50)
        yield 1
        yield local

    owner, captured = Owner(), torch.zeros(10, dtype=torch.int64)
    storage = torch.zeros(100)
    owner.tensors = {"part": storage[3:5], "other": (storage.view(10, 10), None)}
    owner.array = [storage.numpy()[7:], np.zeros((4, 4), np.float32)[1]]
    owner.call = lambda: captured
    owner.running = tensors()
    next(owner.running)
    assert kept_bytes(owner) == 400 + 64 + 80 + 200


def test_what_a_call_holds_counts_temporaries_and_numpys_arrays() -> None:
    n = 2**20

    def action() -> torch.Tensor:
        y = torch.zeros(n)  # 4n
        y = y + 1  # 8n for a moment
        np.zeros(n, np.float32).sum()
        return y[: n // 2].clone()  # 6n

    held = held_bytes(action, CPU)
    assert held.left == pytest.approx(2 * n, rel=0.01)
    # 8n of torch's and 4n of numpy's, though never together: an upper bound
    assert held.peak == pytest.approx(12 * n, rel=0.01)


def keeps(rank: int, world_size: int, backend: Backend, settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes kept after some steps, and the model's parameters."""
    model = DDP(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(3))))
    state = vsa_ddp.register(model, backend=backend, **settings)
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(1, 1024)).sum().backward()
    return kept_bytes(state), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"bundle": 4, "wire": "two_shot"}])
@pytest.mark.parametrize(("backend", "bytes_per_parameter"), [("torch", 0.2), ("numba", 0.08)])
def test_less_than_half_a_byte_per_parameter_is_kept_between_steps(
    tmp_path: Path, backend: Backend, bytes_per_parameter: float, settings: dict[str, Any]
) -> None:
    kept, num_parameters = run_ranks(keeps, 2, tmp_path, backend, settings)[0]
    assert kept < bytes_per_parameter * num_parameters < 0.5 * num_parameters
    # running means of rows and columns, and their roots for encode and for decode
    assert kept > 3 * 3 * 4 * 2 * 1024


def holds(rank: int, world_size: int, backend: Backend) -> list[tuple[torch.dtype, int, list[tuple[int, Held, Held]]]]:
    """For every dtype and bundle and buckets of 1 and 4 matrices: elements, what encode holds, and all of it."""
    found = []
    for dtype, bundle in itertools.product((torch.float32, torch.bfloat16), (1, 4, 16)):
        sizes = []
        for count in (1, 4):
            buckets = Buckets(count * dtype.itemsize, dtype, CPU, cache_bytes=0)
            (bucket,) = buckets.list
            ours = Ours(bucket, backend, bundle)
            ours.encode_and_decode(bucket)  # compiles
            encoded = held_bytes(partial(ours.encode, bucket), CPU)
            whole = held_bytes(partial(ours.encode_and_decode, bucket), CPU)
            sizes.append((buckets.numel, encoded, whole))
        found.append((dtype, bundle, sizes))
    return found


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_what_a_bucket_holds_is_linear_in_its_size_and_bounded(tmp_path: Path, backend: Backend) -> None:
    for dtype, bundle, sizes in run_ranks(holds, 1, tmp_path, backend)[0]:
        # In flight are packed trits, 1.6 bits each: this rank's own, its packet, and two packets that arrive. One
        # element in 1024 is of a vector and travels exactly
        in_flight = 4 * 0.21 / bundle + 16 / 1024
        peak, constant = in_flight + 16 / 1024, 2**16
        if backend == "torch":
            # Keys are drawn before: a bit each. The mean and the rotated mean are hypervectors of 4 / B bytes per
            # element each, and pieces of 2**18 elements pass in several steps
            in_flight, peak, constant = in_flight + 1 / 8, peak + 12 / bundle + 1 / 8, 4 * 2**20
        for numel, encoded, whole in sizes:
            assert 2 * 0.2 / bundle <= encoded.left / numel, (dtype, bundle, numel)
            assert encoded.left <= in_flight * numel + 2**16, (dtype, bundle, numel)
            assert encoded.left < encoded.peak, (dtype, bundle, numel)
            assert whole.peak <= peak * numel + constant, (dtype, bundle, numel)
        smaller, larger = (whole.peak / numel for numel, _, whole in sizes)
        assert larger <= 1.01 * smaller, (dtype, bundle)
