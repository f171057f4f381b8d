"""What was sent, counted where it is handed to a collective."""

from dataclasses import dataclass
from typing import NamedTuple


class CompressionStats(NamedTuple):
    """What `VsaState.compression_stats` tells: totals of this rank, from the saved ones on if a state was loaded."""

    compression: float
    """dense_bytes / wire_bytes: higher is smaller. 1.0 before the first step."""
    dense_bytes: int
    """Bytes of all gradient buckets: what DDP without a hook hands to its all-reduces."""
    wire_bytes: int
    """Bytes that the hook handed to collectives."""
    steps: int
    """Synchronised backward passes."""


@dataclass
class ByteCounter:
    """Running totals of one state."""

    dense_bytes: int = 0
    wire_bytes: int = 0

    def summary(self, steps: int) -> CompressionStats:
        compression = self.dense_bytes / self.wire_bytes if self.wire_bytes else 1.0
        return CompressionStats(compression, self.dense_bytes, self.wire_bytes, steps)
