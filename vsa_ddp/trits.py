"""Vectors of trits in two bit planes, one for +1 and one for -1, with the algebra of popcounts: 2 bits per trit.

The planes hold the same trits as the bytes of `packing`, which are smaller (1.6 bits) and can only be stored or sent.
Here a dot product or a binding of 64 trits is a handful of operations on words.

A plane is a tensor of int64 words: trit i is bit i % 64 of word i // 64, least significant bit first, so that in the
bytes of a little-endian machine it is bit i % 8 of byte i // 8. Bits behind the last trit are zero, and no trit has its
bit in both planes.

Shape letters: D trits in M = ceil(D / 64) words.
"""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vsa_ddp.packing import pack_trits, unpack_trits
from vsa_ddp.ternary import Ternary, ternary_quantize_deterministic

_BITS = 64
_EVERY_2ND, _PAIRS, _NIBBLES, _BYTES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101
_GATHER = sum(1 << 56 - 7 * byte for byte in range(8))
"""Times a word of eight bytes that are 0 or 1: byte i's bit becomes bit i of the highest byte, without a carry."""


class TritCounts(NamedTuple):
    """How many trits are which."""

    minus: int
    zero: int
    plus: int


class PackedTritVec:
    """A vector of trits. Calculates on whatever device its planes are; what returns a number waits for that device.

    `PackedTritVec(1000)` is a vector of zeros; see also `from_trits`, `from_bytes` and `from_votes`. Trits are read and
    written as `v[i]`; everything else makes a new vector. Equal by value, and so not hashable.

    Raises: ValueError where two vectors differ in length or device.
    """

    __slots__ = ("_minus_M", "_num_trits", "_plus_M")

    def __init__(self, num_trits: int, device: torch.device | str | None = None) -> None:
        if num_trits < 0:
            raise ValueError(f"num_trits must be at least 0, got {num_trits}.")
        self._num_trits = num_trits
        self._plus_M = torch.zeros(_num_words(num_trits), dtype=torch.int64, device=device)
        self._minus_M = torch.zeros_like(self._plus_M)

    @classmethod
    def _of(cls, num_trits: int, plus_M: Tensor, minus_M: Tensor) -> Self:
        made = cls.__new__(cls)
        made._num_trits, made._plus_M, made._minus_M = num_trits, plus_M, minus_M
        return made

    @classmethod
    def from_trits(cls, trits_D: Tensor) -> Self:
        """From trits. Exact: `to_trits` inverts it. Shapes: (D,) int8 of {-1, 0, +1}, on any device.

        Raises: TypeError for another dtype; ValueError for other dimensions or values.
        """
        if trits_D.dtype != torch.int8:
            raise TypeError(f"trits must be int8, got {trits_D.dtype}; convert them with .to(torch.int8).")
        if trits_D.dim() != 1:
            raise ValueError(f"trits must have one dimension, got shape {tuple(trits_D.shape)}; flatten() them first.")
        if len(wrong := ((trits_D < -1) | (trits_D > 1)).nonzero()):
            i = int(wrong[0])
            raise ValueError(f"trits must be -1, 0 or +1, got {int(trits_D[i])} at {i}; take their sign() first.")
        return cls.from_votes(trits_D)

    @classmethod
    def from_votes(cls, votes_D: Tensor) -> Self:
        """The signs of votes, see `vote`; a tie is 0. Shapes: (D,) of any integers or floats."""
        return cls._of(len(votes_D), _to_words(votes_D > 0), _to_words(votes_D < 0))

    @classmethod
    def from_bytes(cls, packed_P: Tensor, num_trits: int) -> Self:
        """From base-3 bytes, see `packing.pack_trits`; what fills the last byte is not looked at.

        Shapes: (ceil(D / 5),) uint8. Raises: ValueError for another number of bytes, or a byte that is no five trits.
        """
        if packed_P.dtype != torch.uint8 or packed_P.dim() != 1:
            raise TypeError(f"bytes must be (P,) uint8, got {tuple(packed_P.shape)} {packed_P.dtype}.")
        if len(wrong := (packed_P > 242).nonzero()):
            i = int(wrong[0])
            raise ValueError(f"byte {int(packed_P[i])} at {i} is no five trits, which are at most 242: damaged bytes.")
        return cls.from_votes(unpack_trits(packed_P, num_trits))

    def to_trits(self) -> Tensor:
        """Shapes: -> (D,) int8 of {-1, 0, +1}."""
        return _to_bits(self._plus_M, self._num_trits) - _to_bits(self._minus_M, self._num_trits)

    def to_bytes(self) -> Tensor:
        """Base-3 bytes, five trits to a byte, as on the wire. Shapes: -> (ceil(D / 5),) uint8."""
        return pack_trits(self.to_trits())

    @property
    def plus(self) -> Tensor:
        """The plane of trits +1, not copied. Shapes: (M,) int64."""
        return self._plus_M

    @property
    def minus(self) -> Tensor:
        """The plane of trits -1, not copied. Shapes: (M,) int64."""
        return self._minus_M

    @property
    def device(self) -> torch.device:
        return self._plus_M.device

    def to(self, device: torch.device | str) -> Self:
        """This vector on a device; its own words where it is there already."""
        return self._of(self._num_trits, self._plus_M.to(device), self._minus_M.to(device))

    def __len__(self) -> int:
        return self._num_trits

    def __getitem__(self, index: int) -> int:
        """A trit. Raises: IndexError outside the vector."""
        word, bit = divmod(self._place(index), _BITS)
        return int(self._plus_M[word] >> bit & 1) - int(self._minus_M[word] >> bit & 1)

    def __setitem__(self, index: int, trit: int) -> None:
        """Write a trit, in place. Raises: IndexError outside the vector, ValueError if it is not -1, 0 or +1."""
        word, bit = divmod(self._place(index), _BITS)
        if trit not in (-1, 0, 1):
            raise ValueError(f"a trit is -1, 0 or +1, got {trit}.")
        mask = 1 << bit if bit < _BITS - 1 else -(1 << bit)  # the sign bit of an int64
        for plane_M, sign in ((self._plus_M, 1), (self._minus_M, -1)):
            plane_M[word] &= ~mask
            if trit == sign:
                plane_M[word] |= mask

    get, set = __getitem__, __setitem__

    def _place(self, index: int) -> int:
        place = operator.index(index)
        place += self._num_trits if place < 0 else 0
        if not 0 <= place < self._num_trits:
            raise IndexError(f"index {index} is outside a vector of {self._num_trits} trits.")
        return place

    def counts(self) -> TritCounts:
        """How many trits are -1, 0 and +1."""
        minus, plus = _num_bits(self._minus_M), _num_bits(self._plus_M)
        return TritCounts(minus, self._num_trits - minus - plus, plus)

    def sparsity(self) -> float:
        """The share of zeros, 0..1; 0 for a vector without trits."""
        return self.counts().zero / max(1, self._num_trits)

    def dot(self, other: "PackedTritVec") -> int:
        """The sum of products: how many trits agree in sign less how many differ in it. Exact."""
        product = self.bind(other).counts()
        return product.plus - product.minus

    def cosine(self, other: "PackedTritVec") -> float:
        """dot / (|self| |other|), -1..1; 0 if one of them has zeros alone."""
        dot, norms = self.dot(other), self._norm_squared() * other._norm_squared()
        # the root of the product: exactly 1 of a vector with itself
        return float(dot / math.sqrt(norms)) if norms else 0.0

    def _norm_squared(self) -> int:
        return _num_bits(self._plus_M | self._minus_M)

    def hamming(self, other: "PackedTritVec") -> int:
        """How many trits differ."""
        self._check(other)
        return _num_bits((self._plus_M ^ other._plus_M) | (self._minus_M ^ other._minus_M))

    def negate(self) -> Self:
        """Every trit's opposite: the planes change places."""
        return self._of(self._num_trits, self._minus_M.clone(), self._plus_M.clone())

    __neg__ = negate

    def bind(self, other: "PackedTritVec") -> Self:
        """The elementwise product. Binding twice with a key of +-1 gives this vector back; a 0 in a key erases."""
        self._check(other)
        plus_M = (self._plus_M & other._plus_M) | (self._minus_M & other._minus_M)
        minus_M = (self._plus_M & other._minus_M) | (self._minus_M & other._plus_M)
        return self._of(self._num_trits, plus_M, minus_M)

    unbind = bind

    def bundle(self, *others: "PackedTritVec") -> Self:
        """The sign of the sum of all, taken once; a tie is 0.

        Signs of signs would depend on the order. To bundle in parts, add the parts' `vote`s and take `from_votes`.
        """
        return self.from_votes(vote((self, *others)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedTritVec):
            return NotImplemented
        return (
            self._num_trits == other._num_trits
            and self.device == other.device
            and torch.equal(self._plus_M, other._plus_M)
            and torch.equal(self._minus_M, other._minus_M)
        )

    def __repr__(self) -> str:
        shown = "".join("-0+"[self[i] + 1] for i in range(min(16, self._num_trits)))
        rest = "..." if self._num_trits > 16 else ""
        return f"PackedTritVec({self._num_trits} trits, {self.sparsity():.0%} zeros, {shown}{rest}, {self.device})"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and a number, for torch.save; copied."""
        return {"num_trits": self._num_trits, "plus": self._plus_M.clone(), "minus": self._minus_M.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """A vector from what `state_dict` told. Raises: ValueError if these are no planes of so many trits."""
        num_trits, plus_M, minus_M = state["num_trits"], state["plus"], state["minus"]
        for name, plane_M in (("plus", plus_M), ("minus", minus_M)):
            if plane_M.dtype != torch.int64 or plane_M.shape != (_num_words(num_trits),):
                raise ValueError(
                    f"the plane {name} of {num_trits} trits is ({_num_words(num_trits)},) torch.int64, got "
                    f"{tuple(plane_M.shape)} {plane_M.dtype}; pass what state_dict() returned."
                )
        made = cls._of(num_trits, plus_M.clone(), minus_M.clone())
        if (plus_M & minus_M).any() or made != cls.from_trits(made.to_trits()):
            raise ValueError(f"these are no planes of {num_trits} trits: a trit is +1 and -1, or lies behind the last.")
        return made

    def _check(self, other: "PackedTritVec") -> None:
        if self._num_trits != other._num_trits:
            raise ValueError(f"both vectors must have as many trits, got {self._num_trits} and {other._num_trits}.")
        if self.device != other.device:
            raise ValueError(
                f"both vectors must be on one device, got {self.device} and {other.device}; move one with .to(device)."
            )


def vote(vectors: Iterable[PackedTritVec]) -> Tensor:
    """The sum of vectors, from which `PackedTritVec.from_votes` takes the sign. Votes of parts add up to those of all.

    Shapes: -> (D,) int32. Raises: ValueError if there is no vector, or if they differ in length or device.
    """
    rest = iter(vectors)
    if (first := next(rest, None)) is None:
        raise ValueError("vote needs at least one vector, got none.")
    votes_D = first.to_trits().int()
    for other in rest:
        first._check(other)
        votes_D += other.to_trits()
    return votes_D


def ternary_quantize_packed(
    x: Tensor, quantize: Callable[[Tensor], Ternary] = ternary_quantize_deterministic
) -> tuple[PackedTritVec, Tensor]:
    """A tensor as a packed vector and the value of trit +1; x is near `vector.to_trits().view_as(x) * scale`.

    Args:
        quantize: `ternary_quantize_stochastic` for another one, or a `partial` of either.

    Shapes: any -> D = x.numel(), and () float32.
    """
    trits, scale = quantize(x)
    return PackedTritVec.from_votes(trits.flatten()), scale


def popcount(words: Tensor) -> Tensor:
    """How many bits of each word are set. Shapes: any, int64.

    Source: Warren 2013 (Hacker's Delight), section 5-1; shifts of a negative word are masked, products wrap.
    """
    pairs = words - (words >> 1 & _EVERY_2ND)
    nibbles = (pairs & _PAIRS) + (pairs >> 2 & _PAIRS)
    return (nibbles + (nibbles >> 4) & _NIBBLES) * _BYTES >> 56


def _num_bits(plane_M: Tensor) -> int:
    return int(popcount(plane_M).sum())


def _num_words(num_trits: int) -> int:
    return -(-num_trits // _BITS)


def _to_words(bits_D: Tensor) -> Tensor:
    """A plane from bits. Shapes: (D,) bool -> (M,) int64."""
    octets = torch.nn.functional.pad(bits_D.to(torch.uint8), (0, -len(bits_D) % _BITS)).view(torch.int64)
    return (octets * _GATHER >> 56 & 0xFF).to(torch.uint8).view(torch.int64)


def _to_bits(plane_M: Tensor, num_trits: int) -> Tensor:
    """The bits of a plane. Shapes: (M,) int64 -> (D,) int8 of {0, 1}."""
    shifts = torch.arange(8, dtype=torch.uint8, device=plane_M.device)
    bits = plane_M.view(torch.uint8)[:, None] >> shifts & 1
    return bits.flatten()[:num_trits].view(torch.int8)
