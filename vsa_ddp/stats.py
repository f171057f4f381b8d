"""What was sent, counted where it is handed to a collective; and what was predicted instead."""

import math
import threading
from collections.abc import Sequence
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


class PredictionQuality(NamedTuple):
    """How good a prediction was for the gradient that came."""

    explained: float
    """1 - |g - p|^2 / |g|^2: 1 is perfect, 0 no better than a zero gradient, negative worse than that."""
    cosine: float
    """Between the two."""
    slope: float
    """g p / p p, the multiple of the prediction that fits best: 1 if all that it misses is the gradient's noise, which
    lowers the two above."""

    @classmethod
    def of(cls, moments: Sequence[float]) -> "PredictionQuality":
        """From [g g, g p, p p]. NaN where what is divided by is zero."""
        gg, gp, pp = moments
        return cls(
            explained=(2.0 * gp - pp) / gg if gg else math.nan,
            cosine=gp / math.sqrt(gg * pp) if gg and pp else math.nan,
            slope=gp / pp if pp else math.nan,
        )


class PhaseStats(NamedTuple):
    """What `PhasedTrainer.stats` tells: totals, from the saved ones on if a state was loaded."""

    steps: int
    backwards: int
    """Steps with a backward pass."""
    skipped: int
    """Steps without one."""
    steps_by_phase: dict[str, int]
    speedup: float
    """steps / backwards."""
    cycles: int
    full_steps: int
    """Present length."""
    predict_steps: int
    """Present length; 0 while the gate is shut."""
    loss: float | None
    """The ranks' mean, last agreed on."""
    quality: PredictionQuality | None
    """Of the whole gradient, last agreed on."""
    error_by_horizon: dict[int, float]
    """Steps that a prediction reached ahead -> mean share of the gradient's energy that it did not explain."""
    undone: int
    """Sections of predicted steps that were taken back."""
    dense_bytes_skipped: int
    """Bytes of gradients that skipped backward passes did not hand to DDP; a compressing hook would have sent fewer."""
    seconds_by_phase: dict[str, float]
    """Wall time of this rank inside `step`."""

    def __str__(self) -> str:
        quality = "prediction not measured"
        if self.quality is not None:
            quality = f"cosine {self.quality.cosine:.2f} and slope {self.quality.slope:.2f} of the last prediction"
        return (
            f"{self.backwards} backward passes in {self.steps} steps ({self.speedup:.2f} x), "
            f"{self.dense_bytes_skipped / 2**20:.1f} MiB of gradients not sent, "
            f"{sum(self.seconds_by_phase.values()):.1f} s; {quality}"
            + (f"; {self.undone} sections undone" if self.undone else "")
        )
