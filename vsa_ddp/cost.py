"""What a step's communication costs: a model of latency, bytes and arithmetic, and the advice that follows from it.

    time = hops * latency + bytes / bandwidth + arithmetic + overhead of each bucket

of packets, which are encoded before they are sent, and decoded after; of an all-reduce of floats, which sums what has
arrived while more arrives, the longer of the last two. Without overlap with the backward pass, and between nodes only.
The arithmetic was fitted to `benchmarks/bench_wire.py`'s step times on one CPU core; another machine is as much faster
at it as it is at one rotation (`reference_rotation_s`). Plain numbers: no tensors, no processes.

Letters: N gradient elements, D trits, W ranks.
"""

import math
from dataclasses import dataclass
from typing import Literal

from vsa_ddp.config import VsaConfig
from vsa_ddp.rates import bits_per_trit, num_roundings, unbiased_nmse

Compressed = Literal["all_gather", "all_reduce", "two_shot"]
Method = Literal["dense", "half"] | Compressed
WIRE_METHODS: tuple[Compressed, ...] = ("all_gather", "all_reduce", "two_shot")

BUCKET_BYTES = 25 * 2**20
"""DDP's own; each bucket pays its hops."""
LEVEL_BITS = 16 / 1024
"""Per trit: a bfloat16 level for each block of 1024."""


@dataclass(frozen=True)
class LinkSpeed:
    """What connects two ranks."""

    bytes_per_s: float
    latency_s: float
    """From one rank to the next, one way, software included."""


@dataclass(frozen=True)
class Arithmetic:
    """What one rank calculates, in nanoseconds where nothing else is said."""

    dense_ns: float
    """Per gradient element, of DDP's own copies and the sums of an all-reduce."""
    half_ns: float
    """Per element, of a hook that casts to 16 bits."""
    element_ns: float
    """Per element, of whitening, binding and bundling, both ways."""
    trit_ns: dict[str, float]
    """Per trit, by wire, of rotating, quantising and packing, both ways."""
    sparse_trit_ns: dict[str, float]
    """The same where of several trits one is sent: per trit, sent or not."""
    gathered_trit_ns: float
    """Per trit of every packet of all trits that `all_gather` decodes; zero where the fit finds none beside it."""
    gathered_code_ns: float
    """The same per block code."""
    bucket_ms: float
    """Milliseconds of each bucket, whatever its size and method: calls, threads, memory that is touched anew."""
    reference_rotation_s: float
    """How long one rotation of 2**20 elements took there."""


CPU_CORE = Arithmetic(
    dense_ns=4.99,
    half_ns=4.43,
    element_ns=2.2,
    trit_ns={"all_gather": 0.591, "all_reduce": 6.32, "two_shot": 12.4},
    sparse_trit_ns={"all_gather": 2.27, "two_shot": 21.9},
    gathered_trit_ns=1.19,
    gathered_code_ns=9.22,
    bucket_ms=5.45,
    reference_rotation_s=0.001,
)
"""Fitted by `python -m benchmarks.bench_wire --report`; see benchmarks/results."""


@dataclass(frozen=True)
class Cost:
    """Of one step's communication, on one rank."""

    received_bytes: float
    hops: int
    arithmetic_s: float
    overhead_s: float
    pipelined: bool = False
    """Whether arithmetic goes on while bytes arrive."""

    def seconds(self, link: LinkSpeed) -> float:
        both = self.received_bytes / link.bytes_per_s, self.arithmetic_s
        return self.hops * link.latency_s + self.overhead_s + (max(both) if self.pipelined else sum(both))


def digits_per_lane(num_ranks: int) -> int:
    """How many digits in base 2W + 1, each the sum of W trits, an int64 holds: 27 for 2 ranks, 8 for 64."""
    base, digits = 2 * num_ranks + 1, 1
    while base ** (digits + 1) <= 2**63:
        digits += 1
    return digits


def num_buckets(num_elements: float) -> int:
    """Of DDP's own size, in float32."""
    return math.ceil(4 * num_elements / BUCKET_BYTES)


def cost(
    method: Method,
    num_elements: float,
    world_size: int,
    bundle: int,
    sparsity: int,
    *,
    slowdown: float = 1.0,
) -> Cost:
    """The cost of averaging a gradient. `slowdown`: this machine's time for a rotation over the reference's.

    Hops of each bucket: a ring all-gather has W - 1, a ring all-reduce twice as many, a pairwise all-to-all one.
    """
    w, n, d = world_size, num_elements, num_elements / bundle
    ring, buckets = 2 * (w - 1) / w, num_buckets(n)
    overhead_s = buckets * CPU_CORE.bucket_ms * 1e-3 * slowdown
    if method in ("dense", "half"):
        size, ns = (4, CPU_CORE.dense_ns) if method == "dense" else (2, CPU_CORE.half_ns)
        return Cost(ring * size * n, buckets * 2 * (w - 1), ns * n * 1e-9 * slowdown, overhead_s, pipelined=True)
    packet = (bits_per_trit(sparsity) + LEVEL_BITS) / 8 * d
    received, hops = {
        "all_gather": ((w - 1) * packet, w - 1),
        "all_reduce": ((8 / digits_per_lane(w) + 16 / 1024) * ring * d, 2 * (w - 1)),
        "two_shot": (ring * packet, w),
    }[method]
    ns = CPU_CORE.element_ns * n + (CPU_CORE.trit_ns if sparsity == 1 else CPU_CORE.sparse_trit_ns)[method] * d
    if method == "all_gather":
        ns += w * d * (CPU_CORE.gathered_trit_ns if sparsity == 1 else CPU_CORE.gathered_code_ns / sparsity)
    return Cost(received, buckets * hops, ns * 1e-9 * slowdown, overhead_s)


@dataclass(frozen=True)
class Advice:
    """Milliseconds of communication per step by method, the wire that is best, and whether it pays."""

    num_elements: int
    world_size: int
    bundle: int
    sparsity: int
    """Of the wire, as compression chooses them."""
    link: LinkSpeed
    slowdown: float
    ms: dict[Method, float]
    wire: Compressed
    """The fastest of the compressed wires, each times 1 + noise: by that factor noise makes the batch smaller."""
    pays: bool
    """Whether it beats a dense all-reduce, in 32 and in 16 bits."""

    def __str__(self) -> str:
        gbit = self.link.bytes_per_s * 8e-9
        setting = (
            f"{self.world_size} ranks, {self.num_elements / 1e6:.3g} M parameters, {gbit:.3g} Gbit/s, "
            f"{self.link.latency_s * 1e3:.2g} ms, arithmetic {1 / self.slowdown:.3g} x a CPU core's"
        )
        mine, dense, half = (_rounded(self.ms[method]) for method in (self.wire, "dense", "half"))
        how = f"bundle {self.bundle}" + (f" and sparsity {self.sparsity}" if self.sparsity > 1 else "")
        times = f"{mine} ms of communication a step by {self.wire} with {how}, {dense} dense, {half} in 16 bits"
        if self.pays:
            return f'use wire="{self.wire}": {times} ({setting})'
        return f"leave compression off, it does not pay here: {times} ({setting})"


def _rounded(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def advise(
    num_parameters: int,
    world_size: int,
    *,
    gbit_per_s: float,
    latency_ms: float = 0.1,
    slowdown: float = 1.0,
    compression: float | None = None,
    bundle: int | None = None,
    sparsity: int | None = None,
) -> Advice:
    """Which wire suits, and does it pay? From a model of the link; `print` it for one line.

    Args:
        num_parameters: elements of the gradient.
        world_size: ranks that exchange; with `ranks_per_node`, nodes.
        gbit_per_s: what one rank's link carries each way, in Gbit/s.
        latency_ms: from one rank to the next, in milliseconds.
        slowdown: this machine's time for a rotation over that of the CPU core that the model was fitted on; a GPU's is
            far below 1. `python -m vsa_ddp` measures all three in a running group.
        compression, bundle, sparsity: as in `VsaConfig`, each wire with the code that suits it. "all_reduce" is left
            out where others send few of the trits: at as many bits it has more noise.

    Raises: ValueError for a value that cannot be.
    """
    for name, value in (("num_parameters", num_parameters), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, speed in (("gbit_per_s", gbit_per_s), ("slowdown", slowdown)):
        if not speed > 0:
            raise ValueError(f"{name} must be greater than 0, got {speed}.")
    if not latency_ms >= 0:
        raise ValueError(f"latency_ms must be at least 0, got {latency_ms}.")
    config = VsaConfig(compression=compression, bundle=bundle, sparsity=sparsity)  # type: ignore[arg-type]
    link = LinkSpeed(gbit_per_s * 1e9 / 8, latency_ms * 1e-3)
    codes = {wire: config.for_wire(wire) for wire in WIRE_METHODS if config.sparsity == 1 or wire != "all_reduce"}
    settings: dict[Method, tuple[int, int]] = {"dense": (1, 1), "half": (1, 1)}
    settings |= {wire: (code.bundle, code.sparsity) for wire, code in codes.items()}
    costs = {m: cost(m, num_parameters, world_size, *each, slowdown=slowdown) for m, each in settings.items()}
    ms = {method: each.seconds(link) * 1e3 for method, each in costs.items()}
    noise = {wire: unbiased_nmse(*settings[wire], num_roundings(wire)) for wire in codes}
    wire = min(codes, key=lambda wire: ms[wire] * (1.0 + noise[wire]))
    pays = world_size > 1 and ms[wire] < min(ms["dense"], ms["half"])
    return Advice(num_parameters, world_size, *settings[wire], link, slowdown, ms, wire, pays)
