"""The passes in torch operations: on any device, and what the other backends are compared with.

A parameter passes in pieces of some rows, small enough for all steps on them to stay in a processor's cache; on a GPU
it passes whole. No bit depends on it.

Shape letters: as in `interface`; n elements of a piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa_ddp import hypervector, packing, sparse, ternary
from vsa_ddp.kernels.interface import Keys, Received, Rows, Summed, encode
from vsa_ddp.layout import BucketLayout, Slice
from vsa_ddp.whitening import mean_squares


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

    share: Slice
    rows: slice
    runs: tuple[Run, ...]


def cut(layout: BucketLayout, size: int) -> Iterator[Piece]:
    """The compressed parameters of a bucket in pieces of about `size` elements, at least a row."""
    for s in layout.compressed:
        step = max(1, size // s.num_cols)
        for row in range(0, s.num_rows, step):
            rows = slice(row, min(row + step, s.num_rows))
            first, end = rows.start * s.num_cols, rows.stop * s.num_cols
            runs, at = [], first
            while at < end:
                slot, dim = divmod(at, s.num_dims)
                length = min(end - at, s.num_dims - dim)
                runs.append(Run(slot, s.start + dim, at - first, length))
                at += length
            yield Piece(s, rows, tuple(runs))


class TorchBucket:
    """The passes over one bucket; see `interface.BucketKernels`."""

    def __init__(self, layout: BucketLayout, seed: int, device: torch.device, piece: int | None = None) -> None:
        self._layout, self._seed = layout, seed
        self._pieces = tuple(cut(layout, piece or hypervector.elements_at_once(device)))
        self._counters, self._streams = hypervector.key_counters(layout, range(layout.bundle), device)
        # tables are cached on this stream: the callbacks' streams do not wait for each other
        packing.trits_of_byte(device)
        hypervector.unpack_keys(self._counters.new_zeros(1, dtype=torch.int32))

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        return mean_squares(self._layout, bucket_N)

    def keys(self, step: int) -> Keys:
        return Keys(step, hypervector.key_words(self._counters, self._streams, step, self._seed))

    def encode(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> Tensor:
        y_D = torch.zeros(self._layout.num_dims, dtype=torch.float32, device=bucket_N.device)
        for piece in self._pieces:
            x_RC = self._of(piece, bucket_N)
            if factors_S is None:
                x_n = x_RC.float().flatten()
            else:
                row_R1, col_C = self._factors(piece, factors_S)
                x_n = torch.mul(x_RC.float(), row_R1).mul_(col_C).flatten()
            for run in piece.runs:
                y, x = y_D[run.start : run.start + run.length], x_n[run.offset : run.offset + run.length]
                hypervector.bundle_bound_(y, x, self._key(keys, run))
        return hypervector.rotate(y_D.view(-1, self._layout.rotation_block))

    def decode_(
        self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys, mean: Received, gain: float = 1.0
    ) -> None:
        # the gain here touches D elements instead of N
        y_D = hypervector.rotate(mean_of(mean)).mul_(gain).flatten()
        for piece in self._pieces:
            x = [hypervector.unbind(y_D[r.start : r.start + r.length], self._key(keys, r)) for r in piece.runs]
            x_RC = (x[0] if len(x) == 1 else torch.cat(x)).view(-1, piece.share.num_cols)
            target_RC = self._of(piece, bucket_N)
            if factors_S is not None:
                row_R1, col_C = self._factors(piece, factors_S)
                x_RC.mul_(row_R1)
                if target_RC.dtype == torch.float32:  # one pass less
                    torch.mul(x_RC, col_C, out=target_RC)
                    continue
                x_RC.mul_(col_C)
            target_RC.copy_(x_RC)

    def _of(self, piece: Piece, bucket_N: Tensor) -> Tensor:
        s = piece.share
        return bucket_N[s.offset : s.offset + s.numel].view(s.num_rows, s.num_cols)[piece.rows]

    def _factors(self, piece: Piece, factors_S: Tensor) -> tuple[Tensor, Tensor]:
        s = piece.share
        row_R, col_C = factors_S[s.factors].tensor_split([s.num_rows])
        return row_R[piece.rows, None], col_C

    def _key(self, keys: Keys, run: Run) -> Tensor:
        """The keys of a run, which need not begin or end with a rotation block. Shapes: -> (n,) float32."""
        block = self._layout.rotation_block
        first, end = run.start // block, -(-(run.start + run.length) // block)
        words = keys.words[run.slot].view(-1, block // 32)[first:end]
        return hypervector.unpack_keys(words).view(-1)[run.start - first * block :][: run.length]


class TorchKernels:
    """The torch backend; see `interface.Kernels`."""

    name = "torch"

    def for_bucket(self, layout: BucketLayout, seed: int, device: torch.device) -> TorchBucket:
        return TorchBucket(layout, seed, device)

    def rotate(self, y_TK: Tensor) -> Tensor:
        return hypervector.rotate(y_TK)

    def quantize(self, rows: Rows, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        trits_TK, energy_T, kept_T = ternary.quantize(encode(rows), sigma_T)
        return packing.pack_trits(trits_TK), energy_T, kept_T

    def quantize_sparsely(self, rows: Rows, sparsity: int) -> tuple[Tensor, Tensor, Tensor]:
        codes_TS, energy_T, kept_T = sparse.quantize_sparsely(encode(rows), sparsity)
        return sparse.pack_codes(codes_TS, sparsity), energy_T, kept_T

    def quantize_to_digits(self, rows: Rows, sigma_T: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        trits_TK, energy_T, kept_T = ternary.quantize(encode(rows), sigma_T)
        return packing.pack_digits(trits_TK, num_ranks), energy_T, kept_T

    def mean(self, received: Received) -> Tensor:
        return mean_of(received)


def mean_of(received: Received) -> Tensor:
    """See `interface.Kernels.mean`."""
    if isinstance(received, Tensor):
        return received
    if isinstance(received, Summed):
        num_ranks, block = received.num_ranks, received.shape[1]
        y_TK = packing.unpack_digits(received.lanes_TL, block, num_ranks).mul_(received.levels_T[:, None])
    else:
        num_ranks, (_, block) = len(received.packed_WTP), received.shape
        levels = received.levels.float()
        y_TK = torch.zeros(received.shape, dtype=torch.float32, device=levels.device)
        for rows in hypervector.row_slices(y_TK):
            for rank in range(num_ranks):
                packed_TP = received.packed_WTP[rank, rows]
                if received.sparsity == 1:
                    trits_TK = packing.unpack_trits(packed_TP, block)
                else:
                    trits_TK = sparse.unpack_codes(packed_TP, received.sparsity)
                if levels.dim() == 1:
                    y_TK[rows] += trits_TK
                else:
                    y_TK[rows].addcmul_(trits_TK, levels[rank, rows, None])
            if levels.dim() == 1:
                y_TK[rows] *= levels[rows, None]
    # a number would be divided by on a CPU, and its reciprocal multiplied with on a GPU
    return y_TK.div_(y_TK.new_full((), num_ranks))
