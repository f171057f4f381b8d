"""Stages 1 to 4 of the data flow and back, for one bucket: whiten, bind, bundle, rotate.

A large parameter passes in pieces of some rows, small enough for all steps on them to stay in the processor's cache; a
small one, or any on a GPU, passes whole, with all its slots at once. No bit depends on it.

Shape letters: N elements, B slots, D dimensions, T rotation blocks of K elements (D = T * K), C = D / 128 key counters;
n elements of a piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa_ddp import hypervector, ternary
from vsa_ddp.config import VsaConfig
from vsa_ddp.layout import BucketLayout, Slice
from vsa_ddp.whitening import Whitening


def unbiased_nmse(bundle: int) -> float:
    """Noise over signal of the unbiased decode with full slots: crosstalk B - 1, quantiser B * 0.2348."""
    return bundle * (1.0 + ternary.NMSE) - 1.0


def gain(config: VsaConfig) -> float:
    """What the decoder multiplies by: 1, or the factor of least squared error 1 / (1 + NMSE) = 0.8098 / B."""
    return 1.0 if config.gain == "unbiased" else 1.0 / (1.0 + unbiased_nmse(config.bundle))


@dataclass(frozen=True)
class Run:
    """Elements of a piece that lie side by side in one slot."""

    slot: int
    start: int
    """First dimension, in the bucket's hypervector."""
    offset: int
    """First element, in the piece."""
    length: int


@dataclass(frozen=True)
class Piece:
    """Some rows of a compressed parameter."""

    index: int
    """Of the parameter in the bucket."""
    share: Slice
    rows: slice
    runs: tuple[Run, ...]
    """Empty if the piece is the whole parameter."""


def cut(layout: BucketLayout, size: int) -> Iterator[Piece]:
    """The compressed parameters of a bucket in pieces of about `size` elements, at least a row."""
    for index, s in enumerate(layout.slices):
        if not s.num_dims:
            continue
        step = max(1, size // s.num_cols)
        if step >= s.num_rows:
            yield Piece(index, s, slice(0, s.num_rows), ())
            continue
        for row in range(0, s.num_rows, step):
            rows = slice(row, min(row + step, s.num_rows))
            first, end = rows.start * s.num_cols, rows.stop * s.num_cols
            runs, at = [], first
            while at < end:
                slot, dim = divmod(at, s.num_dims)
                length = min(end - at, s.num_dims - dim)
                runs.append(Run(slot, s.start + dim, at - first, length))
                at += length
            yield Piece(index, s, rows, tuple(runs))


class Codec:
    """Encodes the gradients of one bucket into a hypervector, and decodes the ranks' mean into gradients."""

    def __init__(
        self,
        layout: BucketLayout,
        config: VsaConfig,
        whitening: Whitening,
        device: torch.device,
        piece: int | None = None,
    ) -> None:
        self.layout = layout
        self._config = config
        self._whitening = whitening
        self._pieces = tuple(cut(layout, piece or ternary.elements_at_once(device)))
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
        y_D = torch.zeros(self.layout.num_dims, dtype=torch.float32, device=gradients[0].device)
        for piece in self._pieces:
            x_n = self._whitened(piece, gradients[piece.index])
            if piece.runs:
                for run in piece.runs:
                    y, x = y_D[run.start : run.start + run.length], x_n[run.offset : run.offset + run.length]
                    hypervector.bundle_bound_(y, x, _key(keys, run))
            else:
                s = piece.share
                x_BD = torch.nn.functional.pad(x_n, (0, s.num_dims * self.layout.bundle - s.numel))
                bound_BD = hypervector.bind(x_BD.view(-1, s.num_dims), _keys(keys, s))
                y_D[s.start : s.start + s.num_dims] = hypervector.bundle(bound_BD)
        exact = [g.flatten() for s, g in zip(self.layout.slices, gradients, strict=True) if not s.num_dims]
        exact_E = torch.cat(exact) if exact else gradients[0].new_empty(0)
        return hypervector.rotate(y_D.view(-1, self.layout.rotation_block)), exact_E

    def decode_(self, gradients: list[Tensor], y_TK: Tensor, exact_E: Tensor, keys: Tensor) -> None:
        """Write the decoded mean into `gradients`, in place. y_TK is the ranks' mean."""
        # the gain here touches D elements instead of N
        y_D = hypervector.rotate(y_TK).mul_(gain(self._config)).flatten()
        for piece in self._pieces:
            s = piece.share
            if piece.runs:
                runs = [hypervector.unbind(y_D[r.start : r.start + r.length], _key(keys, r)) for r in piece.runs]
                x_n = runs[0] if len(runs) == 1 else torch.cat(runs)
            else:
                slots_BD = hypervector.unbundle(y_D[s.start : s.start + s.num_dims], self.layout.bundle)
                x_n = hypervector.unbind(slots_BD, _keys(keys, s)).flatten()[: s.numel]
            self._unwhiten_(piece, x_n, gradients[piece.index])
        for s, gradient in zip(self.layout.slices, gradients, strict=True):
            if not s.num_dims:
                gradient.copy_(exact_E[s.start : s.start + s.numel].view_as(gradient))

    def _whitened(self, piece: Piece, gradient: Tensor) -> Tensor:
        """A piece divided by its scales. Shapes: the parameter's -> (n,) float32."""
        x_RC = gradient.reshape(piece.share.num_rows, piece.share.num_cols)[piece.rows]
        if self._config.whiten:
            row, col = self._whitening.factors(piece.share, gradient)
            return torch.div(x_RC, row[piece.rows]).div_(col).flatten()
        return x_RC.float().flatten()

    def _unwhiten_(self, piece: Piece, x_n: Tensor, gradient: Tensor) -> None:
        """Mirror of `_whitened`, written into the gradient's rows."""
        x_RC = x_n.view(-1, piece.share.num_cols)
        target_RC = gradient.view(piece.share.num_rows, piece.share.num_cols)[piece.rows]
        if self._config.whiten:
            row, col = self._whitening.factors(piece.share, gradient)
            x_RC.mul_(row[piece.rows])
            if gradient.dtype == torch.float32:  # one pass less
                torch.mul(x_RC, col, out=target_RC)
                return
            x_RC.mul_(col)
        target_RC.copy_(x_RC)


def _keys(keys: Tensor, s: Slice) -> Tensor:
    """The keys of a parameter. Shapes: (B, D / 8) uint8 -> (B, D_p) float32."""
    return hypervector.unpack_keys(keys[:, s.start // 8 : (s.start + s.num_dims) // 8])


def _key(keys: Tensor, run: Run) -> Tensor:
    """The keys of a run, of which the first need not begin a byte. Shapes: (B, D / 8) uint8 -> (n,) float32."""
    end = run.start + run.length
    signs = hypervector.unpack_keys(keys[run.slot, run.start // 8 : -(-end // 8)])
    return signs[run.start % 8 :][: run.length]
