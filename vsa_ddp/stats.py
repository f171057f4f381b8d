"""What was sent, counted where it is handed to a collective."""

import threading
from dataclasses import asdict, dataclass, field
from typing import NamedTuple


class CompressionStats(NamedTuple):
    """What `VsaState.compression_stats` tells: totals of this rank, from the saved ones on if a state was loaded."""

    compression: float
    """dense_bytes / wire_bytes: higher is smaller. 1.0 before the first step."""
    dense_bytes: int
    """Bytes of all gradient buckets: what DDP without a hook hands to its all-reduces."""
    wire_bytes: int
    """Bytes that the hook handed to collectives; with `ranks_per_node`, to those between nodes."""
    sent_bytes: int
    """Bytes that this rank's collectives put on the network, by their algorithm (ring, pairwise); see `wires.link`."""
    received_bytes: int
    """Bytes that they took from it."""
    local_bytes: int
    """Bytes handed to collectives inside the node; 0 without `ranks_per_node`."""
    bits_per_coordinate: float
    """received_bits / gradient elements; a dense float32 all-reduce has 64 (W - 1) / W. 0.0 before the first step."""
    last_step_bytes: int
    """`wire_bytes` of the last step alone."""
    steps: int
    """Synchronised backward passes."""


@dataclass
class Totals:
    """Running totals, in bytes; `num_elements` counts gradient elements."""

    dense_bytes: int = 0
    num_elements: int = 0
    wire_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    local_bytes: int = 0


@dataclass
class ByteCounter:
    """The totals of one state. Two threads count: the one of backward, and that of a wire's later rounds."""

    totals: Totals = field(default_factory=Totals)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.start_step()

    def add(self, **amounts: int) -> None:
        """Add to the totals named."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.totals, name, getattr(self.totals, name) + amount)

    def start_step(self) -> None:
        """What is sent from now on belongs to another step."""
        self._before_step = self.totals.wire_bytes

    def summary(self, steps: int) -> CompressionStats:
        totals = asdict(self.totals)
        num_elements = totals.pop("num_elements")
        return CompressionStats(
            compression=self.totals.dense_bytes / self.totals.wire_bytes if self.totals.wire_bytes else 1.0,
            bits_per_coordinate=8 * self.totals.received_bytes / num_elements if num_elements else 0.0,
            last_step_bytes=self.totals.wire_bytes - self._before_step,
            steps=steps,
            **totals,
        )
