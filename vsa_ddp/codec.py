"""Stages 1 to 4 of the data flow and back, for one bucket: whiten, bind, bundle, rotate.

Shape letters: N elements of the bucket, E of them exact, S row and column factors, T rotation blocks of K elements.
"""

from functools import cached_property

import torch
from torch import Tensor

from vsa_ddp import hypervector
from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels import Gradient, Kernels, Keys, Received
from vsa_ddp.layout import BucketLayout
from vsa_ddp.rates import num_roundings, unbiased_nmse
from vsa_ddp.whitening import Whitening


def gain(config: VsaConfig) -> float:
    """What the decoder multiplies by: 1, or the factor of least squared error 1 / (1 + NMSE)."""
    if config.gain == "unbiased":
        return 1.0
    return 1.0 / (1.0 + unbiased_nmse(config.bundle, config.sparsity, num_roundings(config.wire)))


class Codec:
    """Encodes the gradients of one bucket into a hypervector, and decodes the ranks' mean into gradients."""

    def __init__(
        self, layout: BucketLayout, config: VsaConfig, whitening: Whitening, device: torch.device, kernels: Kernels
    ) -> None:
        self.layout = layout
        self.kernels = kernels
        self.config = config
        self._whitening = whitening
        self._bucket = kernels.for_bucket(layout, config.seed, device)
        ranges = [torch.arange(s.offset, s.offset + s.numel, device=device) for s in layout.exact]
        self._exact_E = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)
        self._factors_2S: Tensor | None = None
        if config.whiten:
            # what encode multiplies by, and decode; kept in place, since other streams may still read them
            self._factors_2S = torch.empty(2, layout.num_factors, dtype=torch.float32, device=device)
            self.refresh_factors()

    def refresh_factors(self) -> None:
        """Take the whitening's scales as they are now."""
        if self._factors_2S is not None:
            torch.reciprocal(self._factors_2S[1].copy_(self._whitening.factors(self.layout)), out=self._factors_2S[0])

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        """What the whitening is made of, measured on this rank. Shapes: the bucket -> (S,) float32."""
        return self._bucket.mean_squares(bucket_N)

    @cached_property
    def _fresh_counters(self) -> tuple[Tensor, Tensor]:
        slot = self.layout.bundle
        return hypervector.key_counters(self.layout, range(slot, slot + 1), self._exact_E.device)

    def keys(self, step: int) -> Keys:
        """The step's keys: the same on every rank, never sent."""
        return self._bucket.keys(step)

    def fresh_keys(self, step: int) -> Tensor:
        """The step's keys of one slot more, for a second rounding. Shapes: -> (T, K / 32) int32."""
        words = hypervector.key_words(*self._fresh_counters, step, self.config.seed)
        return words.view(-1, self.layout.rotation_block // 32)

    def encode(self, bucket_N: Tensor, keys: Keys) -> tuple[Gradient, Tensor]:
        """The rotated hypervector of this rank, calculated when it is asked for, and small parameters as they are.

        Shapes: the bucket, of any float dtype -> (T, K), (E,) of the bucket's.
        """
        factors_S = None if self._factors_2S is None else self._factors_2S[0]
        block = self.layout.rotation_block
        rows = Gradient(self._bucket, bucket_N, factors_S, keys, (self.layout.num_dims // block, block))
        return rows, bucket_N.index_select(0, self._exact_E)

    def decode_(self, bucket_N: Tensor, mean: Received, exact_E: Tensor, keys: Keys) -> None:
        """Write the ranks' mean into the bucket, in place."""
        factors_S = None if self._factors_2S is None else self._factors_2S[1]
        self._bucket.decode_(bucket_N, factors_S, keys, mean, gain(self.config))
        bucket_N.index_copy_(0, self._exact_E, exact_E)
