"""What a backend has to bring: the passes over a bucket, and those over rows of a hypervector.

All backends calculate the same bits: products in one order, slots added one after the other, sums of rows by halves,
and a rotation that is exact in any order (see `hypervector.rotate`). So ranks may differ in it.

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


class BucketKernels(Protocol):
    """The passes over one bucket."""

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        """`whitening.mean_squares`: (S,) float32, rounded to bfloat16."""

    def keys(self, step: int) -> Keys:
        """The step's keys, for `encode` and `decode_`."""

    def encode(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> Tensor:
        """Whiten by what `factors_S` multiplies with, bind, bundle, rotate. Any float dtype -> (T, K) float32."""

    def decode_(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys, y_TK: Tensor, gain: float = 1.0) -> None:
        """Mirror of `encode`, of gain * y, written into the bucket's compressed parameters."""


class Kernels(Protocol):
    """A backend."""

    @property
    def name(self) -> str:
        """As in `VsaConfig.backend`."""

    def for_bucket(self, layout: BucketLayout, seed: int, device: torch.device) -> BucketKernels:
        """What depends on the bucket, prepared."""

    def rotate(self, y_TK: Tensor) -> Tensor:
        """`hypervector.rotate`."""

    def quantize(self, y_TK: Tensor, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`ternary.quantize` and `packing.pack_trits`: (T, P) uint8, (T,) energies and (T,) what was kept, float32."""

    def quantize_to_digits(self, y_TK: Tensor, sigma_T: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        """`ternary.quantize` and `packing.pack_digits`: (T, L) int64, (T,) and (T,) float32."""

    def sums_of_digits(self, lanes_TL: Tensor, block: int, num_ranks: int) -> Tensor:
        """`packing.unpack_digits`: the sums of trits from the sum of the ranks' lanes. -> (T, K) float32."""

    def mean_of_packed(self, packed_WTP: Tensor, levels_WT: Tensor | None, block: int) -> Tensor:
        """The ranks' mean of trits times levels, or the sum of their trits without levels. In rank order.

        Shapes: uint8, bfloat16 -> (T, K) float32. The packed trits may be a view with gaps between the ranks.
        """
