"""The passes compiled for the CPU by numba, each over one row of a hypervector after the other, within the cache.

The first call compiles, for some seconds; later processes take the code from numba's cache on disk. Functions without
`math` shortcuts: every product and sum is the one that `interface` prescribes. They release the interpreter's lock, and
rows are shared out among as many threads as torch has (`torch.set_num_threads`).

Shape letters: as in `interface`.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from vsa_ddp.cost import digits_per_lane
from vsa_ddp.hypervector import KEYS_PER_COUNTER
from vsa_ddp.kernels.interface import Keys, Received, Rows, Summed
from vsa_ddp.layout import BucketLayout
from vsa_ddp.packing import TRITS_PER_BYTE, trits_of_byte
from vsa_ddp.rates import code_bits
from vsa_ddp.sparse import row_bytes
from vsa_ddp.ternary import THRESHOLD

_THRESHOLD = np.float32(THRESHOLD)
_WORDS_PER_COUNTER = KEYS_PER_COUNTER // 32
_IN_PLACE = (torch.float32, torch.bfloat16)
_LEAST_ROWS = 32
"""Fewer are not worth a thread."""
_OFFSET, _NUMEL, _COLS, _ROWS, _FIRST_ROW, _DIMS, _FACTOR, _STREAM = range(8)
"""Columns of a bucket's table of parameters."""

Array = npt.NDArray[Any]
_U32, _U64, _F32 = np.uint32, np.uint64, np.float32
_SIGN, _ONE = _U32(0x80000000), _U32(0x3F800000)

compiled = njit(nogil=True, cache=True, error_model="numpy")


def _read(part: Array, wide: Array) -> Array:
    """Elements of a bucket in float32: themselves, or what bits of bfloat16 stand for, in `wide`."""
    raise NotImplementedError


@overload(_read, strict=False)
def _compiled_read(part: Any, wide: Any) -> Any:
    def widen(part: Array, wide: Array) -> Array:
        bits = wide.view(_U32)
        for i in range(len(part)):
            bits[i] = _U32(part[i]) << _U32(16)
        return wide[: len(part)]

    return widen if part.dtype == types.uint16 else lambda part, wide: part


def _target(part: Array, wide: Array) -> Array:
    """Where to put float32 for elements of a bucket: themselves, or `wide` for `_write`."""
    raise NotImplementedError


@overload(_target, strict=False)
def _compiled_target(part: Any, wide: Any) -> Any:
    if part.dtype == types.uint16:
        return lambda part, wide: wide[: len(part)]
    return lambda part, wide: part


def _write(part: Array, x: Array) -> None:
    """Round what was put into `_target`'s `wide` to bits of bfloat16, half to even."""
    raise NotImplementedError


@overload(_write, strict=False)
def _compiled_write(part: Any, x: Any) -> Any:
    def narrow(part: Array, x: Array) -> None:
        bits = x.view(_U32)
        for i in range(len(x)):
            rounded = (bits[i] + _U32(0x7FFF) + ((bits[i] >> _U32(16)) & _U32(1))) >> _U32(16)
            part[i] = np.uint16(rounded) if x[i] == x[i] else np.uint16(0x7FC0)

    return narrow if part.dtype == types.uint16 else lambda part, x: None


@compiled
def _copy(x: Array, out: Array) -> None:
    """Quicker than an assignment of slices."""
    for i in range(len(x)):
        out[i] = x[i]


@compiled
def _draw_keys(counter: int, stream: int, step: int, seed: int, words: Array) -> None:
    """Words of `hypervector.key_words` from a counter on; see `hypervector.philox`."""
    for group in range(len(words) // 4):
        c0, c1, c2, c3 = _U32(counter + group), _U32(stream), _U32(step & 0xFFFFFFFF), _U32(step >> 32)
        k0, k1 = _U32(seed & 0xFFFFFFFF), _U32(seed >> 32)
        for _ in range(10):
            p0, p1 = _U64(c0) * _U64(0xD2511F53), _U64(c2) * _U64(0xCD9E8D57)
            c0, c2 = _U32(p1 >> _U64(32)) ^ c1 ^ k0, _U32(p0 >> _U64(32)) ^ c3 ^ k1
            c1, c3 = _U32(p1), _U32(p0)
            k0, k1 = _U32(k0 + _U32(0x9E3779B9)), _U32(k1 + _U32(0xBB67AE85))
        words[4 * group], words[4 * group + 1], words[4 * group + 2], words[4 * group + 3] = c0, c1, c2, c3


@compiled
def _unpack_keys(words: Array, keys_K: Array) -> None:
    """`hypervector.unpack_keys` of one row."""
    keys, n = keys_K.view(_U32), len(words)
    for bit in range(32):
        shift = _U32(31 - bit)
        for i in range(n):
            keys[n * bit + i] = ((words[i] << shift) & _SIGN) | _ONE


@compiled
def _butterflies(x: Array, out: Array) -> None:
    """One stage of the transform; after all of them every element is back at its place."""
    half = len(x) // 2
    for i in range(half):
        out[2 * i], out[2 * i + 1] = x[i] + x[i + half], x[i] - x[i + half]


@compiled
def _stages(block: int) -> int:
    """The logarithm of a power of two."""
    stages = 0
    while 1 << stages < block:
        stages += 1
    return stages


@compiled
def _rotate(y_K: Array, spare_K: Array) -> None:
    """`hypervector.rotate` of one row, in place."""
    block = len(y_K)
    bits = y_K.view(np.int32)
    peak: Any = np.int32(0)
    for i in range(block):
        peak = max(peak, bits[i] & np.int32(0x7FFFFFFF))
    stages = _stages(block)
    shift = min(24 - stages - ((peak >> 23) - 126), 116)
    scale, unit = _F32(math.ldexp(1.0, shift)), _F32(math.ldexp(1.0, -shift)) * _F32(block**-0.5)
    for i in range(block):
        y_K[i] = np.rint(y_K[i] * scale)
    for _ in range(stages // 2):
        _butterflies(y_K, spare_K)
        _butterflies(spare_K, y_K)
    if stages % 2:
        _butterflies(y_K, spare_K)
        for i in range(block):
            y_K[i] = spare_K[i] * unit
    else:
        for i in range(block):
            y_K[i] *= unit


@compiled
def _sum(x_K: Array) -> Any:
    """`ternary.row_sums` of one row; overwrites it."""
    half = len(x_K)
    while half > 1:
        half //= 2
        for i in range(half):
            x_K[i] += x_K[half + i]
    return x_K[0]


@compiled
def _mean_squares(bucket: Array, table: Array, out: Array) -> None:
    """`whitening.mean_squares` in float64; `out` comes as zeros."""
    for p in table[:-1]:
        num_rows, num_cols = p[_ROWS], p[_COLS]
        row_R = out[p[_FACTOR] : p[_FACTOR] + num_rows]
        col_C = out[p[_FACTOR] + num_rows : p[_FACTOR] + num_rows + num_cols]
        # padded to a power of two, for the sum by halves
        size = 1
        while size < num_cols:
            size *= 2
        squared, wide = np.zeros(size, np.float64), np.empty(num_cols, _F32)
        for r in range(num_rows):
            start = p[_OFFSET] + r * num_cols
            x = _read(bucket[start : start + num_cols], wide)
            for c in range(num_cols):
                squared[c] = np.float64(x[c]) * np.float64(x[c])
            for c in range(num_cols):
                col_C[c] += squared[c]
            squared[num_cols:] = 0
            row_R[r] = _sum(squared) / num_cols
        for c in range(num_cols):
            col_C[c] /= num_rows


@compiled
def _bind(x: Array, keys: Array, factors: Array, p: Array, start: int, out: Array, add: bool) -> None:
    """Elements of a parameter from `start` on, times their row factors, column factors and keys; put or added.

    The prescribed bits in both directions: where keys of +-1 are multiplied with changes none.
    """
    row, col, at = start // p[_COLS], start % p[_COLS], 0
    while at < len(x):
        end = min(len(x), at + p[_COLS] - col)
        scale, cols = factors[p[_FACTOR] + row], factors[p[_FACTOR] + p[_ROWS] + col :]
        part, part_keys, part_out = x[at:end], keys[at:end], out[at:end]
        if add:
            for i in range(len(part)):
                part_out[i] += part[i] * scale * cols[i] * part_keys[i]
        else:
            for i in range(len(part)):
                part_out[i] = part[i] * scale * cols[i] * part_keys[i]
        row, col, at = row + 1, 0, end


@compiled
def _spare(block: int) -> Any:
    """What functions of a row need beside it: words of keys, keys, and floats of a row in whole bytes or lanes."""
    return np.empty(block // 32, _U32), np.empty(block, _F32), np.empty(block + 64, _F32)


@compiled
def _encode_row(t: int, gradient: Any, y_K: Array, spare: Any) -> None:
    """A row of `interface.Gradient`."""
    bucket, factors, table, owner, step, seed = gradient
    words, keys, wide = spare
    bundle, block = table[-1, 0], len(y_K)
    p = table[owner[t]]
    dim = (t - p[_FIRST_ROW]) * block
    y_K[:] = _F32(0)
    for slot in range(bundle):
        start = slot * p[_DIMS] + dim
        length = min(block, p[_NUMEL] - start)
        if length <= 0:
            break
        _draw_keys(start // KEYS_PER_COUNTER, p[_STREAM], step, seed, words)
        _unpack_keys(words, keys)
        at = p[_OFFSET] + start
        _bind(_read(bucket[at : at + length], wide), keys, factors, p, start, y_K, True)
    _rotate(y_K, wide[:block])


@compiled
def _decode_row(t: int, gradient: Any, y_K: Array, gain: float, spare: Any) -> None:
    """Mirror of `_encode_row`; overwrites the row."""
    bucket, factors, table, owner, step, seed = gradient
    words, keys, wide = spare
    bundle, block = table[-1, 0], len(y_K)
    p = table[owner[t]]
    dim = (t - p[_FIRST_ROW]) * block
    _rotate(y_K, wide[:block])
    for i in range(block):
        y_K[i] *= gain
    for slot in range(bundle):
        start = slot * p[_DIMS] + dim
        length = min(block, p[_NUMEL] - start)
        if length <= 0:
            break
        _draw_keys(start // KEYS_PER_COUNTER, p[_STREAM], step, seed, words)
        _unpack_keys(words, keys)
        at = p[_OFFSET] + start
        part = bucket[at : at + length]
        x = _target(part, wide)
        _bind(y_K[:length], keys, factors, p, start, x, False)
        _write(part, x)


@compiled
def _ternarise(y_K: Array, sigma: Any, digits: Array, spare_K: Array) -> tuple[Any, Any]:
    """Trits plus one, the energy and what was kept of it. A sigma below zero stands for the row's own."""
    block = len(y_K)
    for i in range(block):
        spare_K[i] = y_K[i] * y_K[i]
    energy = _sum(spare_K)
    if sigma < 0:
        sigma = np.sqrt(energy / _F32(block))
    threshold = _THRESHOLD * sigma
    for i in range(block):
        size = abs(y_K[i])
        spare_K[i] = size if size > threshold else _F32(0)
        digits[i] = np.uint8(1) + np.uint8(y_K[i] > threshold) - np.uint8(y_K[i] < -threshold)
    return energy, _sum(spare_K)


@compiled
def _where(code: Any, run: Any, stages: int) -> Any:
    """`sparse.diagonals`: the element of a code, of 2**stages, in a run."""
    turn = run + (run >> stages) + (run >> 2 * stages)
    return run << stages | ((code + turn) & ((1 << stages) - 1))


@compiled
def _largest(y_K: Array, sparsity: int, codes: Array, spare_K: Array, sizes: Array) -> tuple[Any, Any]:
    """`sparse.quantize_sparsely` of a row: block codes, the energy and what was kept of it."""
    block, n, stages = len(y_K), len(codes), _stages(len(codes))
    for i in range(block):
        spare_K[i] = y_K[i] * y_K[i]
    energy, bits = _sum(spare_K), y_K.view(np.int32)
    for s in range(n):
        sizes[s], codes[s] = bits[s] & np.int32(0x7FFFFFFF), np.int32(0)
    twice = spare_K[: 2 * n].view(np.int32)
    for run in range(1, sparsity):
        # a run twice has all its turns in one piece
        _copy(bits[run * n : run * n + n], twice[:n])
        _copy(twice[:n], twice[n:])
        first = _where(0, run, stages) - run * n
        part = twice[first : first + n]
        for s in range(n):
            size = part[s] & np.int32(0x7FFFFFFF)
            codes[s] = np.int32(run) if size > sizes[s] else codes[s]
            sizes[s] = max(size, sizes[s])
    for s in range(n):
        y = y_K[_where(s, codes[s], stages)]
        spare_K[s] = abs(y)
        codes[s] += np.int32(sparsity) if y < 0 else np.int32(0)
    return energy, _sum(spare_K[:n])


@compiled
def _add_codes(row: Array, num_bits: int, n: int, level: Any, y_K: Array) -> None:
    """Add the trits of `sparse.unpack_codes` times their level: what is zero adds nothing, unless the level is not
    finite."""
    if not np.isfinite(level):
        y_K[:] = np.nan
    sparsity, stages = 1 << (num_bits - 1), _stages(n)
    for first in range(0, n, 8):
        word, at = _U64(0), first // 8 * num_bits
        for i in range(num_bits):
            word |= _U64(row[at + i]) << _U64(8 * i)
        for s in range(first, first + 8):
            code = np.int64(word >> _U64((s - first) * num_bits)) & (2 * sparsity - 1)
            y_K[_where(s, code & (sparsity - 1), stages)] += level if code < sparsity else -level


@compiled
def _sum_packed(t: int, packets: Any, y_K: Array, spare: Any) -> None:
    """The ranks' trits times levels."""
    packed, stride, levels, table, num_bits = packets
    block, trits = len(y_K), spare[2]
    n = block >> max(0, num_bits - 1)
    num_bytes = n // 8 * num_bits if num_bits else -(-block // TRITS_PER_BYTE)
    y_K[:] = _F32(0)
    for rank in range(len(levels)):
        row, level = packed[rank * stride + t * num_bytes :], levels[rank, t]
        if num_bits:
            _add_codes(row, num_bits, n, level, y_K)
            continue
        for i in range(num_bytes):
            # all read before the first is written: the compiler cannot know that they do not overlap
            byte = row[i]
            a, b, c, d, e = table[byte, 0], table[byte, 1], table[byte, 2], table[byte, 3], table[byte, 4]
            trits[5 * i], trits[5 * i + 1], trits[5 * i + 2], trits[5 * i + 3], trits[5 * i + 4] = a, b, c, d, e
        for i in range(block):
            y_K[i] += level * trits[i]


@compiled
def _sums_of_digits(lanes_L: Array, num_digits: int, base: int, y_K: Array, spare: Any) -> None:
    """`packing.unpack_digits` of a row. Halves of a lane are exact in float64, whose division by the base is quick."""
    n, low, sums = len(lanes_L), num_digits // 2, spare[2]
    half, zero = base**low, np.float64(base // 2)
    rest = np.empty(n, np.float64)
    for part in range(2):
        for i in range(n):
            rest[i] = lanes_L[i] // half if part else lanes_L[i] % half
        for d in range(low if part else 0, num_digits if part else low):
            for i in range(n):
                quotient = np.floor(rest[i] / base)
                sums[d * n + i] = rest[i] - quotient * base - zero
                rest[i] = quotient
    _copy(sums[: len(y_K)], y_K)


@compiled
def _row(t: int, source: Any, y_K: Array, spare: Any) -> None:
    """A row of `interface.Rows`, see `_source`."""
    rows, gradient = source
    if len(rows):
        _copy(rows[t], y_K)
    else:
        _encode_row(t, gradient, y_K, spare)


@compiled
def _mean_row(t: int, received: Any, y_K: Array, spare: Any) -> None:
    """A row of `interface.Received`, see `_arrived`."""
    rows, packets, lanes, num_digits, shared, num_ranks = received
    if len(rows):
        _copy(rows[t], y_K)
        return
    if len(lanes):
        _sums_of_digits(lanes[t], num_digits, 2 * num_ranks + 1, y_K, spare)
    else:
        _sum_packed(t, packets, y_K, spare)
    level, divisor = shared[t] if len(shared) else _F32(1), _F32(num_ranks)
    for i in range(len(y_K)):
        y_K[i] = y_K[i] * level / divisor


@compiled
def _encode(first: int, last: int, gradient: Any, y: Array) -> None:
    spare = _spare(y.shape[1])
    for t in range(first, last):
        _encode_row(t, gradient, y[t], spare)


@compiled
def _decode(first: int, last: int, gradient: Any, received: Any, gain: float, block: int) -> None:
    spare, y_K = _spare(block), np.empty(block, _F32)
    for t in range(first, last):
        _mean_row(t, received, y_K, spare)
        _decode_row(t, gradient, y_K, gain, spare)


@compiled
def _mean(first: int, last: int, received: Any, y: Array) -> None:
    spare = _spare(y.shape[1])
    for t in range(first, last):
        _mean_row(t, received, y[t], spare)


@compiled
def _rotate_rows(first: int, last: int, y: Array, out: Array) -> None:
    spare = np.empty(y.shape[1], _F32)
    for t in range(first, last):
        _copy(y[t], out[t])
        _rotate(out[t], spare)


@compiled
def _quantize(
    first: int, last: int, source: Any, block: int, sigma: Array, packed: Array, energy: Array, kept: Array
) -> None:
    num_bytes, y_K, spare = packed.shape[1], np.empty(block, _F32), _spare(block)
    digits = np.ones(num_bytes * TRITS_PER_BYTE, np.uint8)
    for t in range(first, last):
        _row(t, source, y_K, spare)
        energy[t], kept[t] = _ternarise(y_K, sigma[t] if len(sigma) else _F32(-1), digits, spare[2][:block])
        for i in range(num_bytes):
            d = digits[5 * i : 5 * i + 5]
            packed[t, i] = d[0] + 3 * d[1] + 9 * d[2] + 27 * d[3] + 81 * d[4]


@compiled
def _quantize_sparsely(
    first: int, last: int, source: Any, block: int, sparsity: int, packed: Array, energy: Array, kept: Array
) -> None:
    n, num_bits, y_K, spare = block // sparsity, _stages(sparsity) + 1, np.empty(block, _F32), _spare(block)
    codes, sizes = np.empty(n, np.int32), np.empty(n, np.int32)
    for t in range(first, last):
        _row(t, source, y_K, spare)
        energy[t], kept[t] = _largest(y_K, sparsity, codes, spare[2][:block], sizes)
        for group in range(0, n, 8):
            word, at = _U64(0), group // 8 * num_bits
            for s in range(group, group + 8):
                word |= _U64(codes[s]) << _U64((s - group) * num_bits)
            for i in range(num_bits):
                packed[t, at + i] = np.uint8((word >> _U64(8 * i)) & _U64(255))


@compiled
def _quantize_to_digits(
    first: int,
    last: int,
    source: Any,
    block: int,
    sigma: Array,
    num_digits: int,
    base: int,
    lanes: Array,
    energy: Array,
    kept: Array,
) -> None:
    n, y_K, spare = lanes.shape[1], np.empty(block, _F32), _spare(block)
    digits = np.ones(num_digits * n, np.uint8)
    for t in range(first, last):
        _row(t, source, y_K, spare)
        energy[t], kept[t] = _ternarise(y_K, sigma[t], digits, spare[2][:block])
        lane = lanes[t]
        lane[:] = 0
        for d in range(num_digits - 1, -1, -1):
            for i in range(n):
                lane[i] = lane[i] * base + digits[d * n + i]


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


class NumbaBucket:
    """The passes over one bucket; see `interface.BucketKernels`."""

    def __init__(self, layout: BucketLayout, seed: int) -> None:
        self._seed, self._block = seed, layout.rotation_block
        rows = [
            (s.offset, s.numel, s.num_cols, s.num_rows, s.start // self._block, s.num_dims, s.first_factor, s.name_hash)
            for s in layout.compressed
        ]
        self._num_factors = layout.num_factors
        self._ones = np.ones(layout.num_factors, np.float32)
        self._table = np.array([*rows, (layout.bundle, *[0] * 7)], np.int64)
        counts = [s.num_dims // self._block for s in layout.compressed]
        self._owner = np.repeat(np.arange(len(rows), dtype=np.int32), counts)

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        found_S = torch.zeros(self._num_factors, dtype=torch.float64)
        _mean_squares(_bits(bucket_N), self._table, found_S.numpy())
        return found_S.bfloat16().float()

    def keys(self, step: int) -> Keys:
        return Keys(step, torch.empty(0, dtype=torch.int32))

    def arrays(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> tuple[Any, ...]:
        """A gradient as kernels take it."""
        factors = self._ones if factors_S is None else factors_S.numpy()
        return _bits(bucket_N), factors, self._table, self._owner, keys.step, self._seed

    def encode(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> Tensor:
        y_TK = _floats(len(self._owner), self._block)
        _share(_encode, len(y_TK), self.arrays(bucket_N, factors_S, keys), y_TK.numpy())
        return y_TK

    def decode_(
        self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys, mean: Received, gain: float = 1.0
    ) -> None:
        gradient = self.arrays(bucket_N, factors_S, keys)
        _share(_decode, len(self._owner), gradient, _arrived(mean), np.float32(gain), self._block)
        if bucket_N.dtype not in _IN_PLACE:
            bucket_N.copy_(torch.from_numpy(gradient[0]))


class NumbaKernels:
    """The numba backend; see `interface.Kernels`."""

    name = "numba"

    def for_bucket(self, layout: BucketLayout, seed: int, device: torch.device) -> NumbaBucket:
        return NumbaBucket(layout, seed)

    def rotate(self, y_TK: Tensor) -> Tensor:
        rotated_TK = torch.empty_like(y_TK)
        _share(_rotate_rows, len(y_TK), y_TK.numpy(), rotated_TK.numpy())
        return rotated_TK

    def quantize(self, rows: Rows, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = rows.shape
        packed_TP = torch.empty(num_rows, -(-block // TRITS_PER_BYTE), dtype=torch.uint8)
        energy_T, kept_T = _floats(num_rows), _floats(num_rows)
        found = packed_TP.numpy(), energy_T.numpy(), kept_T.numpy()
        _share(_quantize, num_rows, _source(rows), block, _array(sigma_T), *found)
        return packed_TP, energy_T, kept_T

    def quantize_sparsely(self, rows: Rows, sparsity: int) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = rows.shape
        packed_TP = torch.empty(num_rows, row_bytes(block, sparsity), dtype=torch.uint8)
        energy_T, kept_T = _floats(num_rows), _floats(num_rows)
        found = packed_TP.numpy(), energy_T.numpy(), kept_T.numpy()
        _share(_quantize_sparsely, num_rows, _source(rows), block, sparsity, *found)
        return packed_TP, energy_T, kept_T

    def quantize_to_digits(self, rows: Rows, sigma_T: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = rows.shape
        digits = digits_per_lane(num_ranks)
        lanes_TL = torch.empty(num_rows, -(-block // digits), dtype=torch.int64)
        energy_T, kept_T = _floats(num_rows), _floats(num_rows)
        found = lanes_TL.numpy(), energy_T.numpy(), kept_T.numpy()
        base = 2 * num_ranks + 1
        _share(_quantize_to_digits, num_rows, _source(rows), block, _array(sigma_T), digits, base, *found)
        return lanes_TL, energy_T, kept_T

    def mean(self, received: Received) -> Tensor:
        if isinstance(received, Tensor):
            return received
        y_TK = _floats(*received.shape)
        _share(_mean, len(y_TK), _arrived(received), y_TK.numpy())
        return y_TK


_NONE, _NO_ROWS, _NO_LANES = _floats(0).numpy(), _floats(0, 0).numpy(), np.empty((0, 0), np.int64)
_NO_GRADIENT = _NONE, _NONE, _NO_LANES, np.empty(0, np.int32), 0, 0
_NO_PACKETS = np.empty(0, np.uint8), 0, _NO_ROWS, _NO_ROWS, 0


def _source(rows: Rows) -> tuple[Any, ...]:
    """What kernels take for rows: floats, or none and a gradient."""
    if isinstance(rows, Tensor):
        return rows.numpy(), _NO_GRADIENT
    assert isinstance(rows.bucket, NumbaBucket)
    return _NO_ROWS, rows.bucket.arrays(rows.bucket_N, rows.factors_S, rows.keys)


def _arrived(received: Received) -> tuple[Any, ...]:
    """What kernels take for a mean: floats, or packets, or lanes and their digits; levels that all share; ranks."""
    if isinstance(received, Tensor):
        return received.numpy(), _NO_PACKETS, _NO_LANES, 0, _NONE, 1
    if isinstance(received, Summed):
        w = received.num_ranks
        return _NO_ROWS, _NO_PACKETS, received.lanes_TL.numpy(), digits_per_lane(w), received.levels_T.numpy(), w
    (w, num_rows, num_bytes), stride = received.packed_WTP.shape, received.packed_WTP.stride(0)
    assert received.packed_WTP[0].is_contiguous()
    flat = received.packed_WTP.as_strided(((w - 1) * stride + num_rows * num_bytes if num_rows else 0,), (1,))
    levels = received.levels.float()
    own, shared = (_floats(w, num_rows).fill_(1), levels.numpy()) if levels.dim() == 1 else (levels, _NONE)
    num_bits = code_bits(received.sparsity) if received.sparsity > 1 else 0
    packets = flat.numpy(), stride, own.contiguous().numpy(), trits_of_byte(flat.device).numpy(), num_bits
    return _NO_ROWS, packets, _NO_LANES, 0, shared, w


def _bits(bucket_N: Tensor) -> Array:
    """What kernels take for a bucket: itself as float32 or as bits of bfloat16, or else a copy in float32."""
    if bucket_N.dtype == torch.bfloat16:
        bits: Array = bucket_N.view(torch.int16).numpy().view(np.uint16)
        return bits
    return _array(bucket_N.float())


def _array(tensor: Tensor | None) -> Array:
    """What kernels take for a tensor or for none."""
    found: Array = np.empty(0, np.float32) if tensor is None else tensor.numpy()
    return found


def _share(kernel: Callable[..., None], num_rows: int, *args: Any) -> None:
    """Run a kernel over all rows, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), max(1, num_rows // _LEAST_ROWS))
    bounds = [num_rows * i // threads for i in range(threads + 1)]
    if threads == 1:
        kernel(0, num_rows, *args)
        return
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(kernel, a, b, *args) for a, b in pairwise(bounds[1:])]
    kernel(0, bounds[1], *args)
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="vsa_ddp")
