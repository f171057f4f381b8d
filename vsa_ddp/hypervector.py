"""MAP algebra on torch tensors: +-1 keys, bind by product, bundle by sum, and the rotation. Names as in torchhd.

Shape letters: B slots, D dimensions, T rotation blocks of K elements, C = D / 128 key counters.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vsa_ddp.layout import BucketLayout

KEYS_PER_COUNTER = 128
"""Keys (bits) that one Philox counter yields."""

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor | int, Tensor | int, Tensor | int], seed: int) -> Tensor:
    """Philox4x32-10: four random 32-bit words for each 128-bit counter, a pure function of counter and seed.

    Shapes: int64 tensors that broadcast together, or ints, of values 0..2**32-1 -> (..., 4) int64 of the same range.
    Exact, the same on every device.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the words are those of Random123.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2**64; shift-and-mask reads both halves of the unsigned product all the same
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (p1 >> 32 & _MASK) ^ c1 ^ k0, (p0 >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def key_counters(layout: BucketLayout, slots: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counters and streams of a bucket's keys, for `key_words`. Shapes: -> (slots, D / 128) int64 twice."""
    empty = torch.zeros(len(slots), 0, dtype=torch.int64, device=device)
    counters, streams = [empty], [empty]
    for s in layout.compressed:
        per_slot = s.num_dims // KEYS_PER_COUNTER
        count = torch.arange(slots.start * per_slot, slots.stop * per_slot, device=device).view(len(slots), per_slot)
        counters.append(count)
        streams.append(torch.full_like(count, s.name_hash))
    return torch.cat(counters, 1), torch.cat(streams, 1)


def key_words(counter_BC: Tensor, stream_BC: Tensor, step: int, seed: int) -> Tensor:
    """The keys of one step, a bit each; `unpack_keys` tells which bit is whose.

    Args: counter_BC counts the 128-key groups of a parameter, stream_BC tells parameters apart (0..2**32-1).
    Shapes: (B, C) int64 -> (B, 4 * C) int32.
    """
    words = philox((counter_BC, stream_BC, step & _MASK, step >> 32 & _MASK), seed)
    return words.to(torch.int32).flatten(1)


def unpack_keys(words: Tensor) -> Tensor:
    """+-1 keys of rotation blocks of K elements from their n = K / 32 words: bit 1 is -1.

    Bit j of word i belongs to element j * n + i, so that every machine unpacks whole vectors of words at once.
    Shapes: (..., n) int32 -> (..., K) float32.
    """
    shifted = words[..., None, :] << _shifts(words.device)
    return shifted.bitwise_and_(_SIGN).bitwise_or_(_ONE).view(torch.float32).flatten(-2)


_SIGN, _ONE = -(2**31), 0x3F800000
"""The sign bit of a float32, and the bits of 1.0."""


@cache
def _shifts(device: torch.device) -> Tensor:
    """What brings each of 32 bits to the sign's place."""
    return torch.arange(31, -1, -1, dtype=torch.int32, device=device)[:, None]


def bind(x: Tensor, keys: Tensor) -> Tensor:
    """Elementwise product. Binding twice with the same +-1 keys gives x back, exactly."""
    return x * keys


unbind = bind


def bundle_bound_(y: Tensor, x: Tensor, keys: Tensor) -> Tensor:
    """y += bind(x, keys), in place and in one pass: one more slot of a bundle."""
    return y.addcmul_(x, keys)


@cache
def hadamard(size: int) -> npt.NDArray[np.float32]:
    """The Sylvester Hadamard matrix, unnormalised. Shapes: -> (size, size) of +-1; size a power of two."""
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


def rotate(y_TK: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each row; its own inverse. With random signs it makes rows Gaussian.

    A row is rounded first to integers of at most 2**24 / K times a power of two of its own. Then float32 holds every
    sum of them exactly, and a transform has the same bits in any order of summation, on any processor. The rounding
    costs at most K**3 / (12 * 2**46) of a row's energy: 1.3e-6 for blocks of 1024, beside the quantiser's 0.23.

    Shapes: (T, K) float32 -> (T, K); K a power of two of at most 2**14. A value that is not finite spreads in its row.
    """
    rotated_TK = torch.empty_like(y_TK)
    for rows in row_slices(y_TK):
        q, unit = to_fixed_point(y_TK[rows])
        torch.mul(walsh_hadamard(q), unit[:, None], out=rotated_TK[rows])
    return rotated_TK


def row_slices(y_TK: Tensor) -> Iterator[slice]:
    """Rows to work on at a time: on a CPU core 1 MiB of float32, which stays in its cache; on a GPU, which that would
    not fill, 64 MiB, since what is calculated in between takes several times as much.

    No bit depends on it.
    """
    num_rows, block = y_TK.shape
    step = max(1, elements_at_once(y_TK.device) // block)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def elements_at_once(device: torch.device) -> int:
    """See `row_slices`."""
    return 2**18 if device.type == "cpu" else 2**24


def to_fixed_point(y_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as integers, and what one of them is worth after the transform. Shapes: (T, K) -> (T, K), (T,) float32.

    The greatest of a row is below 2**exponent; that becomes 2**24 / K. Rows under 2**-102 keep fewer bits.
    """
    block = y_TK.shape[1]
    peak_T = y_TK.abs().amax(1)
    exponent_T = (peak_T.view(torch.int32) >> 23) - 126
    shift_T = (25 - block.bit_length() - exponent_T).clamp_(max=116)
    scale_T, inverse_T = ((127 + s << 23).view(torch.float32) for s in (shift_T, -shift_T))
    return torch.mul(y_TK, scale_T[:, None]).round_(), inverse_T.mul_(block**-0.5)


def walsh_hadamard(q_TK: Tensor) -> Tensor:
    """The transform of rows of integers, unnormalised and exact. Shapes: (T, K) float32 -> (T, K)."""
    num_rows, block = q_TK.shape
    if q_TK.device.type == "cpu":
        # two products with small matrices (K = L * R): numpy's are the fastest without a compiler, and always float32
        left = 1 << (block.bit_length() - 1) // 2
        q_TLR = q_TK.numpy().reshape(num_rows, left, block // left)
        return torch.from_numpy((hadamard(left) @ q_TLR @ hadamard(block // left)).reshape(num_rows, block))
    half = block // 2
    while half:  # torch's products may be of fewer bits there
        a, b = q_TK.view(num_rows, -1, 2, half).unbind(2)
        q_TK = torch.stack([a + b, a - b], 2)
        half //= 2
    return q_TK.view(num_rows, block)
