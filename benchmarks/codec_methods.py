"""What `bench_codec` measures: a bucket, and the arithmetic that each method does on it.

Shape letters: N elements of a bucket, T rotation blocks of K elements, W = 2 ranks, P bytes of a packet.
"""

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.futures import Future

import vsa_ddp
from vsa_ddp.config import Backend
from vsa_ddp.kernels import Keys, Packed
from vsa_ddp.ternary import level
from vsa_ddp.wires import WIRES, Link, Mean, Message

POWERSGD_RANK = 4
USUAL_STEP, STEP_WITH_SCALES = 33, 40
"""Scales are measured in every tenth step."""


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A default group of this process alone."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the host's name resolves to
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class InstantGroup(dist.ProcessGroup):
    """One rank whose all-reduces are done at once, in the thread that asks: there the profiler sees the callbacks."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def allreduce(self, tensors: list[Tensor], options: object = None) -> dist.Work:
        device = tensors[0].device
        done: Future[list[Tensor]] = Future(devices=[device] if device.type == "cuda" else [])
        done.set_result(tensors)
        return _create_work_from_future(done)


def shapes(numel: int) -> list[tuple[int, ...]]:
    """Square matrices of at most 1024 x 1024 with so many elements in all, each with a vector of its width."""
    found: list[tuple[int, ...]] = []
    side = 1024
    while numel >= 32 * 32:
        while numel >= side * side:
            found += [(side, side), (side,)]
            numel -= side * side
        side //= 2
    return found


@dataclass(frozen=True)
class Bucket:
    """Stands in for DDP's GradBucket, which only DDP can make."""

    data_N: Tensor
    params: list[Tensor]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return False  # steps are not counted: methods set the step that they want

    def buffer(self) -> Tensor:
        return self.data_N

    def parameters(self) -> list[Tensor]:
        return self.params

    def gradients(self) -> list[Tensor]:
        parts = self.data_N.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]


class Buckets:
    """The same gradients in several buckets, used in turn, so that none is in a cache of `cache_bytes`."""

    def __init__(self, mib: float, dtype: torch.dtype, device: torch.device, cache_bytes: int) -> None:
        self.device = device
        # no memory: only identity and shape of a parameter matter
        params = [torch.empty(shape, device="meta") for shape in shapes(int(mib * 2**20) // dtype.itemsize)]
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        gradients = []
        for p in params:
            gradient = normal(*p.shape)
            if p.dim() == 2:  # rows and columns of different size
                gradient *= normal(p.shape[0], 1).exp() * normal(1, p.shape[1]).exp()
            gradients.append(1e-3 * gradient.flatten())
        self._original_N = torch.cat(gradients).to(dtype)
        least = 8 if device.type == "cuda" and cache_bytes else 1
        count = max(least, -(-2 * cache_bytes // self._original_N.nbytes))
        self.list = [Bucket(self._original_N.clone(), params) for _ in range(count)]
        self.copies = [torch.empty_like(self._original_N) for _ in range(count)]

    @property
    def nbytes(self) -> int:
        return self._original_N.nbytes

    @property
    def numel(self) -> int:
        return self._original_N.numel()

    def reset(self) -> None:
        """Methods write in place, and decoding what was decoded would end in overflow."""
        for bucket in self.list:
            bucket.data_N.copy_(self._original_N)


@dataclass
class Method:
    """One thing to time."""

    name: str
    run: Callable[[Bucket, Tensor], object]
    """What is timed, for a bucket and as much memory to write to."""
    prepare: Callable[[Bucket], None] | None = None
    """What goes before it, for each bucket."""
    backend: str = ""
    bundle: int = 0


class Both(Link):
    """A link to one other rank, which sends the same packet at once."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 2

    def all_gather(self, packet_P: Tensor) -> tuple[Future[Any], Tensor]:
        done: Future[Any] = Future()
        done.set_result(None)
        return done, packet_P.repeat(2, 1)


@dataclass(frozen=True)
class InFlight:
    """What waits for the ranks' packets."""

    keys: Keys
    rounds: Generator[Future[Any], None, Mean]


class Ours:
    """vsa_hook and its parts, on buckets of one model."""

    def __init__(self, bucket: Bucket, backend: Backend, bundle: int) -> None:
        self.backend, self.bundle = backend, bundle
        self.state = vsa_ddp.VsaState(config=vsa_ddp.VsaConfig(backend=backend, bundle=bundle))
        vsa_ddp.vsa_hook(self.state, bucket).wait()  # the first step is exact and measures the scales
        self.codec, _, _ = self.state.begin(bucket)
        self._in_flight: list[InFlight] = []

    def encode(self, bucket: Bucket) -> InFlight:
        """From the bucket to the packet."""
        keys = self.codec.keys(USUAL_STEP)
        rows, exact_E = self.codec.encode(bucket.data_N, keys)
        message = Message(self.codec.kernels, rows, exact_E, exact_E.new_empty(0, dtype=torch.float32))
        rounds = WIRES["all_gather"].exchange(message, Both())
        next(rounds)
        return InFlight(keys, rounds)

    def decode(self, bucket: Bucket, in_flight: InFlight) -> None:
        """From two packets to the bucket."""
        try:
            next(in_flight.rounds)
        except StopIteration as finished:
            mean: Mean = finished.value
            self.codec.decode_(bucket.data_N, mean.rows, mean.exact_E, in_flight.keys)

    def encode_and_decode(self, bucket: Bucket) -> None:
        self.decode(bucket, self.encode(bucket))

    def hook(self, bucket: Bucket, step: int) -> None:
        self.state.step = step
        vsa_ddp.vsa_hook(self.state, bucket).wait()

    def methods(self) -> list[Method]:
        def prepare(bucket: Bucket) -> None:
            self._in_flight.append(self.encode(bucket))

        named: list[tuple[str, Callable[[Bucket, Tensor], object], Callable[[Bucket], None] | None]] = [
            ("encode", lambda bucket, _: self.encode(bucket), None),
            ("decode", lambda bucket, _: self.decode(bucket, self._in_flight.pop()), prepare),
            ("hook", lambda bucket, _: self.hook(bucket, USUAL_STEP), None),
            ("hook with scales", lambda bucket, _: self.hook(bucket, STEP_WITH_SCALES), None),
        ]
        return [Method(name, run, before, self.backend, self.bundle) for name, run, before in named]

    def passes(self) -> list[Method]:
        """The passes of `encode` and `decode`, each alone."""
        layout, kernels = self.codec.layout, self.codec.kernels
        factors_S = self.state.whitening.factors(layout)
        bucket_kernels = kernels.for_bucket(layout, self.state.config.seed, factors_S.device)
        keys = bucket_kernels.keys(USUAL_STEP)
        y_TK = torch.randn(layout.num_dims // layout.rotation_block, layout.rotation_block, device=factors_S.device)
        packed_TP, energy_T, kept_T = kernels.quantize(y_TK)
        levels_T = level(energy_T, kept_T).bfloat16()
        packed = Packed(packed_TP.repeat(2, 1, 1), levels_T.repeat(2, 1), (len(y_TK), layout.rotation_block))
        named: list[tuple[str, Callable[[Bucket, Tensor], object]]] = [
            ("keys", lambda *_: bucket_kernels.keys(USUAL_STEP)),
            ("whiten to rotate", lambda bucket, _: bucket_kernels.encode(bucket.data_N, factors_S, keys)),
            ("ternarise and pack", lambda *_: kernels.quantize(y_TK)),
            ("unpack and mean", lambda *_: kernels.mean(packed)),
            ("rotate to unwhiten", lambda bucket, _: bucket_kernels.decode_(bucket.data_N, factors_S, keys, y_TK)),
        ]
        return [Method(name, run, None, self.backend, self.bundle) for name, run in named]


class PowerSgd:
    """PyTorch's own hook, with its defaults beyond the rank."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.state = powerSGD_hook.PowerSGDState(group, POWERSGD_RANK, start_powerSGD_iter=2)
        self.state.iter = 2

    def hook(self, bucket: Bucket) -> None:
        powerSGD_hook.powerSGD_hook(self.state, bucket).wait()


def bf16_and_back(bucket: Bucket, _: Tensor) -> None:
    """What PyTorch's bf16_compress_hook calculates."""
    bucket.data_N.copy_(bucket.data_N.to(torch.bfloat16).div_(2))


def references(dtype: torch.dtype) -> list[Method]:
    """What the codec is compared with."""
    power = PowerSgd()
    found = [Method("memcpy", lambda bucket, copy_N: copy_N.copy_(bucket.data_N))]
    if dtype != torch.bfloat16:
        found.append(Method("bf16 and back", bf16_and_back))
    return [*found, Method("PowerSGD", lambda bucket, _: power.hook(bucket))]
