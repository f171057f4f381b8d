"""The sum of one parameter's gradients, kept in packed trits from one micro-batch to the next.

It is kept as the codec sends a gradient: whitened by its own rows, bound with +-1 keys, rotated, rounded to trits,
packed five to a byte. To add a gradient it is decoded, added to in float32, and rounded again with fresh keys. Each
rounding is unbiased given what it rounds, so the last sum is.

With q the error of one rounding (`ternary.NMSES`), k of them leave (k + 1) / 2 * q of the sum's energy as noise, and a
little more, if the gradients have nothing in common. At two trits per element, 3.2 bits, that is 0.15 for k = 8. Votes,
which are the trits of all micro-batches added up as integers, keep 0.23 whatever k is, at 4.3 bits for k = 8.

Rows only: where columns differ as much from row to row, as in a layer that predicts classes of which few are frequent,
the product of row and column scales fits badly, and a few elements that it makes large drown the others.

Shape letters: N elements of a piece, R rows, C columns, S = R + C, T rotation blocks of K elements in P bytes.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from vsa_ddp import packing, ternary
from vsa_ddp.config import Backend, VsaConfig
from vsa_ddp.kernels import load_kernels
from vsa_ddp.layout import BucketLayout, Slice, is_compressed, plan_bucket
from vsa_ddp.whitening import relative_root

_BLOCK = 256
"""Elements of a rotation block: a parameter is filled up to whole ones, and each has a level of 2 bytes."""
_PIECE = 2**22
"""Elements that are decoded at once, about: some 100 MiB of float32 for a moment, however large a parameter is."""
_LEAST_COLUMNS = 32
"""Of a row, so that its mean of 2 bytes takes half a bit per element at most; else there is no whitening."""


@dataclass(frozen=True)
class Rounding:
    """How sums are rounded."""

    trits: int
    """Per element: 1, 2 or 3."""
    seed: int
    """Of the keys."""
    backend: Backend
    """As in `VsaConfig`."""

    def __post_init__(self) -> None:
        if self.trits not in (1, 2, 3):
            raise ValueError(f"trits must be 1, 2 or 3 per element, got {self.trits!r}.")
        VsaConfig(seed=self.seed, backend=self.backend)  # refuses what it would refuse


class RoundedSum(Protocol):
    """The sum of gradients of one shape."""

    shape: tuple[int, ...]

    def take(self, gradient: Tensor, draw: int) -> None:
        """Add a gradient of any float dtype. `draw` numbers the keys: another one for every call."""

    def add_to(self, target: Tensor, divisor: int) -> None:
        """Make the target (itself + the sum) / divisor, in place: calculated in float32, rounded once."""

    @property
    def device(self) -> torch.device:
        """Where the last gradient was."""

    @property
    def num_bytes(self) -> int:
        """What it takes between two gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Its tensors, which nothing will write to."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` told of a sum of the same shape."""


def rounded_sum(name: str, shape: tuple[int, ...], rounding: Rounding) -> RoundedSum:
    """A new sum, without a gradient yet: exact for the small parameters that the codec leaves exact."""
    return _TernarySum(name, shape, rounding) if _in_trits(shape) else _ExactSum(shape)


def rounded_bytes(shape: tuple[int, ...], trits: int) -> int:
    """What a sum of gradients of this shape takes."""
    return sum(p.num_bytes(trits) for p in _cut("", shape)) if _in_trits(shape) else 4 * math.prod(shape)


def _in_trits(shape: tuple[int, ...]) -> bool:
    return is_compressed(shape, VsaConfig())


@dataclass(frozen=True)
class _Piece:
    """Some rows of a parameter's first dimension."""

    rows: slice
    layout: BucketLayout
    """As if they were a whole parameter."""

    @property
    def share(self) -> Slice:
        return self.layout.compressed[0]

    @property
    def num_means(self) -> int:
        """One for each row, or none if they would take too much beside the trits."""
        return self.share.num_rows if self.share.num_cols >= _LEAST_COLUMNS else 0

    def num_bytes(self, trits: int) -> int:
        """Of a `_Part`."""
        num_blocks = self.layout.num_dims // _BLOCK
        return num_blocks * (-(-trits * _BLOCK // packing.TRITS_PER_BYTE) + 2) + 2 * self.num_means


@cache
def _cut(name: str, shape: tuple[int, ...]) -> tuple[_Piece, ...]:
    """A parameter in pieces of about equal size; which ones depends on its shape alone."""
    config = VsaConfig(bundle=1, rotation_block=_BLOCK, min_numel=1)
    num_pieces = min(shape[0], -(-math.prod(shape) // _PIECE))
    step = -(-shape[0] // num_pieces)
    pieces = []
    for first in range(0, shape[0], step):
        rows = slice(first, min(first + step, shape[0]))
        layout = plan_bucket(((f"{name}[{first}]", (rows.stop - first, *shape[1:])),), config)
        pieces.append(_Piece(rows, layout))
    return tuple(pieces)


@dataclass(frozen=True)
class _Part:
    """The sum of a piece, rounded."""

    draw: int
    """Which keys it is bound with."""
    packed_TP: Tensor
    """`ternary.quantize_finely`'s digits in bytes: uint8."""
    levels_T: Tensor
    """bfloat16."""
    means_R: Tensor
    """Mean squares of the rows: bfloat16."""

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.packed_TP, self.levels_T, self.means_R))


def _encode(x_N: Tensor, piece: _Piece, draw: int, rounding: Rounding) -> _Part:
    """Whiten, bind, rotate, round, pack. Shapes: (N,) float32, which is not written to."""
    bucket = load_kernels(rounding.backend, x_N.device).for_bucket(piece.layout, rounding.seed, x_N.device)
    factors_S, means_R = None, x_N.new_empty(0, dtype=torch.bfloat16)
    if piece.num_means:
        means_R = bucket.mean_squares(x_N)[: piece.num_means].bfloat16()  # they come rounded to it
        scales_S = _scales(means_R, piece.share)
        factors_S = torch.where(scales_S > 0, scales_S.reciprocal(), 0.0)
    y_TK = bucket.encode(x_N, factors_S, bucket.keys(draw))
    digits, energy_T, kept_T = ternary.quantize_finely(y_TK, rounding.trits)
    return _Part(draw, packing.pack_trits(digits), ternary.level(energy_T, kept_T).bfloat16(), means_R)


def _decode(part: _Part, piece: _Piece, device: torch.device, rounding: Rounding) -> Tensor:
    """Mirror of `_encode`. Shapes: -> (N,) float32."""
    bucket = load_kernels(rounding.backend, device).for_bucket(piece.layout, rounding.seed, device)
    digits = packing.unpack_trits(part.packed_TP.to(device), rounding.trits * _BLOCK)
    y_TK = ternary.dequantize_finely(digits, part.levels_T.to(device), rounding.trits)
    scales_S = _scales(part.means_R.to(device), piece.share) if piece.num_means else None
    x_N = torch.empty(piece.share.numel, dtype=torch.float32, device=device)
    bucket.decode_(x_N, scales_S, bucket.keys(part.draw), y_TK)
    return x_N


def _scales(means_R: Tensor, share: Slice) -> Tensor:
    """What whitening divides rows by, and ones for columns. Zero for a row of zeros, so that it comes back as zeros.

    Shapes: (R,) -> (S,) float32.
    """
    row_R = relative_root(means_R.float()).mul_(means_R > 0)
    return torch.cat([row_R, row_R.new_ones(share.num_cols)])


class _TernarySum:
    """A sum in trits."""

    def __init__(self, name: str, shape: tuple[int, ...], rounding: Rounding) -> None:
        self.shape = shape
        self._rounding = rounding
        self._pieces = _cut(name, shape)
        self._parts: list[_Part] = []

    def take(self, gradient: Tensor, draw: int) -> None:
        parts = []
        for i, piece in enumerate(self._pieces):
            x_N = gradient[piece.rows].float().flatten()
            if self._parts:
                x_N = _decode(self._parts[i], piece, gradient.device, self._rounding).add_(x_N)
            parts.append(_encode(x_N, piece, draw, self._rounding))
        self._parts = parts

    def add_to(self, target: Tensor, divisor: int) -> None:
        for piece, part in zip(self._pieces, self._parts, strict=True):
            rows = target[piece.rows]
            x = _decode(part, piece, target.device, self._rounding).view(rows.shape)
            rows.copy_(x.add_(rows).div_(divisor))

    @property
    def device(self) -> torch.device:
        return self._parts[0].packed_TP.device

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._parts)

    def state_dict(self) -> dict[str, Any]:
        return {"shape": self.shape, "parts": [dict(vars(part)) for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._parts = [_Part(**part) for part in state["parts"]]


class _ExactSum:
    """A sum in float32."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._sum = torch.zeros(shape, dtype=torch.float32)

    def take(self, gradient: Tensor, draw: int) -> None:
        self._sum = self._sum.to(gradient.device) + gradient.float()

    def add_to(self, target: Tensor, divisor: int) -> None:
        target.copy_(self._sum.to(target.device).add(target).div_(divisor))

    @property
    def device(self) -> torch.device:
        return self._sum.device

    @property
    def num_bytes(self) -> int:
        return self._sum.numel() * self._sum.element_size()

    def state_dict(self) -> dict[str, Any]:
        return {"shape": self.shape, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum = state["sum"]
