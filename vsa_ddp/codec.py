"""Stages 1 to 4 of the data flow and back, for one bucket: whiten, bind, bundle, rotate.

Shape letters: N elements, B slots, D dimensions, T rotation blocks of K elements (D = T * K), C = D / 128 key counters.
"""

import torch
from torch import Tensor

from vsa_ddp import hypervector, ternary
from vsa_ddp.config import VsaConfig
from vsa_ddp.layout import BucketLayout
from vsa_ddp.whitening import Whitening


def unbiased_nmse(bundle: int) -> float:
    """Noise over signal of the unbiased decode with full slots: crosstalk B - 1, quantiser B * 0.2348."""
    return bundle * (1.0 + ternary.NMSE) - 1.0


def gain(config: VsaConfig) -> float:
    """What the decoder multiplies by: 1, or the factor of least squared error 1 / (1 + NMSE) = 0.8098 / B."""
    return 1.0 if config.gain == "unbiased" else 1.0 / (1.0 + unbiased_nmse(config.bundle))


class Codec:
    """Encodes the gradients of one bucket into a hypervector, and decodes the ranks' mean into gradients."""

    def __init__(self, layout: BucketLayout, config: VsaConfig, whitening: Whitening, device: torch.device) -> None:
        self.layout = layout
        self._config = config
        self._whitening = whitening
        counters, streams = [], []
        per_slot = hypervector.KEYS_PER_COUNTER
        for s in layout.compressed:
            # one row more than slots: the fresh keys of a wire that rounds a second time
            rows = layout.bundle + 1
            count = torch.arange(rows * s.num_dims // per_slot, device=device).view(rows, -1)
            counters.append(count)
            streams.append(torch.full_like(count, s.name_hash))
        empty = torch.zeros(layout.bundle + 1, 0, dtype=torch.int64, device=device)
        self._counters = torch.cat([empty, *counters], 1)
        self._streams = torch.cat([empty, *streams], 1)

    def keys(self, step: int) -> Tensor:
        """The step's keys, as bits: the same on every rank, never sent. Shapes: -> (B, D / 8) uint8."""
        return hypervector.key_bits(self._counters[:-1], self._streams[:-1], step, self._config.seed)

    def fresh_keys(self, step: int) -> Tensor:
        """The step's keys of one slot more, for a second rounding. Shapes: -> (D / 8,) uint8."""
        return hypervector.key_bits(self._counters[-1:], self._streams[-1:], step, self._config.seed)[0]

    def encode(self, gradients: list[Tensor], keys: Tensor) -> tuple[Tensor, Tensor]:
        """The rotated hypervector of this rank, and its small parameters as they are.

        Shapes: gradients of the bucket's parameters in its order, any float dtype -> (T, K) float32, (E,) theirs.
        """
        x_BD = self._whiten(gradients)
        y_D = hypervector.bundle(hypervector.bind(x_BD, hypervector.unpack_keys(keys)))
        exact = [g.flatten() for s, g in zip(self.layout.slices, gradients, strict=True) if not s.num_dims]
        exact_E = torch.cat(exact) if exact else gradients[0].new_empty(0)
        return hypervector.rotate(y_D.view(-1, self.layout.rotation_block)), exact_E

    def decode_(self, gradients: list[Tensor], y_TK: Tensor, exact_E: Tensor, keys: Tensor) -> None:
        """Write the decoded mean into `gradients`, in place. y_TK is the ranks' mean."""
        y_D = hypervector.rotate(y_TK).flatten()
        slots_BD = hypervector.unbundle(y_D, self.layout.bundle)
        x_BD = hypervector.unbind(slots_BD, hypervector.unpack_keys(keys))
        self._unwhiten_(gradients, x_BD.mul_(gain(self._config)), exact_E)

    def _whiten(self, gradients: list[Tensor]) -> Tensor:
        """Divide by the scales and lay out in slots. Shapes: the bucket's gradients -> (B, D) float32."""
        x_BD = torch.zeros(self.layout.bundle, self.layout.num_dims, dtype=torch.float32, device=gradients[0].device)
        for s, gradient in zip(self.layout.slices, gradients, strict=True):
            if not s.num_dims:
                continue
            x_N = gradient.float().flatten()
            if self._config.whiten:
                row, col = self._whitening.factors(s, gradient)
                x_N = (x_N.view(s.num_rows, s.num_cols) / row).div_(col).flatten()
            share_BD = x_BD[:, s.start : s.start + s.num_dims]
            full = s.numel // s.num_dims
            share_BD[:full] = x_N[: full * s.num_dims].view(full, s.num_dims)
            rest_N = x_N[full * s.num_dims :]
            if rest_N.numel():
                share_BD[full, : rest_N.numel()] = rest_N
        return x_BD

    def _unwhiten_(self, gradients: list[Tensor], x_BD: Tensor, exact_E: Tensor) -> None:
        """Mirror of `_whiten`, written into `gradients`; the exact elements go back as they are."""
        for s, gradient in zip(self.layout.slices, gradients, strict=True):
            if not s.num_dims:
                gradient.copy_(exact_E[s.start : s.start + s.numel].view_as(gradient))
                continue
            x_N = x_BD[:, s.start : s.start + s.num_dims].flatten()[: s.numel]
            if self._config.whiten:
                row, col = self._whitening.factors(s, gradient)
                x_N = (x_N.view(s.num_rows, s.num_cols) * row).mul_(col)
            gradient.copy_(x_N.view_as(gradient))
