"""What a backend has to bring: the passes over a bucket, and those over rows of a hypervector.

All backends calculate the same bits: products in one order, slots added one after the other, sums of rows by halves,
and a rotation that is exact in any order (see `hypervector.rotate`). So ranks may differ in it.

A hypervector need not exist as floats: `quantize` encodes a `Gradient` row by row and leaves its trits, `decode_` takes
what a wire has `Received` row by row.

Shape letters: N elements of a bucket, B slots, D dimensions, T rotation blocks of K elements (D = T * K) in P bytes or
L lanes, S row and column factors of the bucket, W ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vsa_ddp.layout import BucketLayout


@dataclass(frozen=True)
class Keys:
    """The keys of a step: the same on every rank, never sent."""

    step: int
    words: Tensor
    """As bits, see `hypervector.unpack_keys`; none if the backend draws them as it goes. (B, D / 32) int32."""


@dataclass(frozen=True)
class Gradient:
    """What a bucket holds, as rows of a hypervector that are calculated when they are asked for."""

    bucket: "BucketKernels"
    bucket_N: Tensor
    """Of any float dtype."""
    factors_S: Tensor | None
    """What whitening multiplies with, float32."""
    keys: Keys
    shape: tuple[int, ...]
    """(T, K)."""


Rows = Gradient | Tensor
"""Rows of a rotated hypervector, to be calculated or (T, K) float32."""


def encode(rows: Rows) -> Tensor:
    """The rows in float32. Shapes: -> (T, K)."""
    if isinstance(rows, Tensor):
        return rows
    return rows.bucket.encode(rows.bucket_N, rows.factors_S, rows.keys)


@dataclass(frozen=True)
class Packed:
    """The mean of the ranks' rows, from the trits of each."""

    packed_WTP: Tensor
    """uint8; may be a view with gaps between the ranks, but not between the rows."""
    levels: Tensor
    """The value of trit +1 in each row: each rank's own (W, T), bfloat16; or one for all (T,), float32: then what is
    summed are integers."""
    shape: tuple[int, ...]
    """(T, K)."""
    sparsity: int = 1
    """1: trits as `packing.pack_trits` packs them; n: block codes, see `sparse`."""


@dataclass(frozen=True)
class Summed:
    """The mean of the ranks' rows, from lanes of digits that the network has summed."""

    lanes_TL: Tensor
    """int64, see `packing.pack_digits`."""
    levels_T: Tensor
    """The value of trit +1 in each row, float32."""
    num_ranks: int
    shape: tuple[int, ...]
    """(T, K)."""


Received = Packed | Summed | Tensor
"""The mean of the ranks' rows, to be calculated or (T, K) float32. In rank order: trits times levels, over W."""


class BucketKernels(Protocol):
    """The passes over one bucket."""

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        """`whitening.mean_squares`: (S,) float32, rounded to bfloat16."""

    def keys(self, step: int) -> Keys:
        """The step's keys, for `encode` and `decode_`."""

    def encode(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> Tensor:
        """Whiten by what `factors_S` multiplies with, bind, bundle, rotate. Any float dtype -> (T, K) float32."""

    def decode_(
        self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys, mean: Received, gain: float = 1.0
    ) -> None:
        """Mirror of `encode`, of gain * mean, written into the bucket's compressed parameters."""


class Kernels(Protocol):
    """A backend."""

    @property
    def name(self) -> str:
        """As in `VsaConfig.backend`."""

    def for_bucket(self, layout: BucketLayout, seed: int, device: torch.device) -> BucketKernels:
        """What depends on the bucket, prepared."""

    def rotate(self, y_TK: Tensor) -> Tensor:
        """`hypervector.rotate`."""

    def quantize(self, rows: Rows, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`ternary.quantize` and `packing.pack_trits`: (T, P) uint8, (T,) energies and (T,) what was kept, float32."""

    def quantize_sparsely(self, rows: Rows, sparsity: int) -> tuple[Tensor, Tensor, Tensor]:
        """`sparse.quantize_sparsely` and `sparse.pack_codes`: (T, P) uint8, (T,) and (T,) float32."""

    def quantize_to_digits(self, rows: Rows, sigma_T: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        """`ternary.quantize` and `packing.pack_digits`: (T, L) int64, (T,) and (T,) float32."""

    def mean(self, received: Received) -> Tensor:
        """The mean in float32. Shapes: -> (T, K)."""
