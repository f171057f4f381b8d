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
from vsa_ddp.kernels.interface import Keys
from vsa_ddp.layout import BucketLayout
from vsa_ddp.packing import TRITS_PER_BYTE, trits_of_byte
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


def _read(bucket: Array, start: int, length: int, spare: Array) -> Array:
    """Elements of a bucket: a view of them, or what bits of bfloat16 stand for, in `spare`."""
    raise NotImplementedError


@overload(_read, strict=False)
def _compiled_read(bucket: Any, start: Any, length: Any, spare: Any) -> Any:
    def widen(bucket: Array, start: int, length: int, spare: Array) -> Array:
        bits = spare.view(_U32)
        for i in range(length):
            bits[i] = _U32(bucket[start + i]) << _U32(16)
        return spare[:length]

    if bucket.dtype == types.uint16:
        return widen
    return lambda bucket, start, length, spare: bucket[start : start + length]


def _target(bucket: Array, start: int, length: int, spare: Array) -> Array:
    """Where to put float32 for elements of a bucket: themselves, or `spare` for `_write`."""
    raise NotImplementedError


@overload(_target, strict=False)
def _compiled_target(bucket: Any, start: Any, length: Any, spare: Any) -> Any:
    if bucket.dtype == types.uint16:
        return lambda bucket, start, length, spare: spare[:length]
    return lambda bucket, start, length, spare: bucket[start : start + length]


def _write(bucket: Array, start: int, x: Array) -> None:
    """Round what was put into `_target`'s `spare` to bits of bfloat16, half to even."""
    raise NotImplementedError


@overload(_write, strict=False)
def _compiled_write(bucket: Any, start: Any, x: Any) -> Any:
    def narrow(bucket: Array, start: int, x: Array) -> None:
        bits = x.view(_U32)
        for i in range(len(x)):
            rounded = (bits[i] + _U32(0x7FFF) + ((bits[i] >> _U32(16)) & _U32(1))) >> _U32(16)
            bucket[start + i] = np.uint16(rounded) if x[i] == x[i] else np.uint16(0x7FC0)

    return narrow if bucket.dtype == types.uint16 else lambda bucket, start, x: None


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
def _rotate(y_K: Array, spare_K: Array) -> None:
    """`hypervector.rotate` of one row, in place."""
    block = len(y_K)
    bits = y_K.view(np.int32)
    peak: Any = np.int32(0)
    for i in range(block):
        peak = max(peak, bits[i] & np.int32(0x7FFFFFFF))
    stages = 0
    while 1 << stages < block:
        stages += 1
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
        squared, spare = np.zeros(size, np.float64), np.empty(size, _F32)
        for r in range(num_rows):
            x = _read(bucket, p[_OFFSET] + r * num_cols, num_cols, spare)
            for c in range(num_cols):
                squared[c] = np.float64(x[c]) * np.float64(x[c])
            for c in range(num_cols):
                col_C[c] += squared[c]
            squared[num_cols:] = 0
            row_R[r] = _sum(squared) / num_cols
        for c in range(num_cols):
            col_C[c] /= num_rows


@compiled
def _add_bound(x: Array, row: float, col: Array, keys: Array, y: Array) -> None:
    for i in range(len(x)):
        y[i] += x[i] * row * col[i] * keys[i]


@compiled
def _unbind(y: Array, keys: Array, row: float, col: Array, out: Array) -> None:
    for i in range(len(out)):
        out[i] = y[i] * keys[i] * row * col[i]


@compiled
def _encode(
    first: int, last: int, bucket: Array, factors: Array, table: Array, owner: Array, step: int, seed: int, y: Array
) -> None:
    bundle, block = table[-1, 0], y.shape[1]
    words, keys, spare = np.empty(block // 32, _U32), np.empty(block, _F32), np.empty(block, _F32)
    for t in range(first, last):
        p = table[owner[t]]
        dim = (t - p[_FIRST_ROW]) * block
        y[t] = _F32(0)
        for slot in range(bundle):
            start = slot * p[_DIMS] + dim
            length = min(block, p[_NUMEL] - start)
            if length <= 0:
                break
            _draw_keys(start // KEYS_PER_COUNTER, p[_STREAM], step, seed, words)
            _unpack_keys(words, keys)
            g = _read(bucket, p[_OFFSET] + start, length, spare)
            if len(factors):
                row, col, at = start // p[_COLS], start % p[_COLS], 0
                while at < length:
                    end = min(length, at + p[_COLS] - col)
                    cols = factors[p[_FACTOR] + p[_ROWS] + col :]
                    _add_bound(g[at:end], factors[p[_FACTOR] + row], cols, keys[at:], y[t, at:])
                    row, col, at = row + 1, 0, end
            else:
                for i in range(length):
                    y[t, i] += g[i] * keys[i]
        _rotate(y[t], spare)


@compiled
def _decode(
    first: int,
    last: int,
    bucket: Array,
    factors: Array,
    table: Array,
    owner: Array,
    step: int,
    seed: int,
    y: Array,
    gain: float,
) -> None:
    bundle, block = table[-1, 0], y.shape[1]
    words, keys = np.empty(block // 32, _U32), np.empty(block, _F32)
    rotated, spare = np.empty(block, _F32), np.empty(block, _F32)
    for t in range(first, last):
        p = table[owner[t]]
        dim = (t - p[_FIRST_ROW]) * block
        rotated[:] = y[t]
        _rotate(rotated, spare)
        for i in range(block):
            rotated[i] *= gain
        for slot in range(bundle):
            start = slot * p[_DIMS] + dim
            length = min(block, p[_NUMEL] - start)
            if length <= 0:
                break
            _draw_keys(start // KEYS_PER_COUNTER, p[_STREAM], step, seed, words)
            _unpack_keys(words, keys)
            g = _target(bucket, p[_OFFSET] + start, length, spare)
            if len(factors):
                row, col, at = start // p[_COLS], start % p[_COLS], 0
                while at < length:
                    end = min(length, at + p[_COLS] - col)
                    cols = factors[p[_FACTOR] + p[_ROWS] + col :]
                    _unbind(rotated[at:], keys[at:], factors[p[_FACTOR] + row], cols, g[at:end])
                    row, col, at = row + 1, 0, end
            else:
                for i in range(length):
                    g[i] = rotated[i] * keys[i]
            _write(bucket, p[_OFFSET] + start, g)


@compiled
def _rotate_rows(first: int, last: int, y: Array, out: Array) -> None:
    spare = np.empty(y.shape[1], _F32)
    for t in range(first, last):
        out[t] = y[t]
        _rotate(out[t], spare)


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
def _quantize(first: int, last: int, y: Array, sigma: Array, packed: Array, energy: Array, kept: Array) -> None:
    block, num_bytes = y.shape[1], packed.shape[1]
    digits, spare = np.ones(num_bytes * TRITS_PER_BYTE, np.uint8), np.empty(block, _F32)
    for t in range(first, last):
        energy[t], kept[t] = _ternarise(y[t], sigma[t] if len(sigma) else _F32(-1), digits, spare)
        for i in range(num_bytes):
            d = digits[5 * i : 5 * i + 5]
            packed[t, i] = d[0] + 3 * d[1] + 9 * d[2] + 27 * d[3] + 81 * d[4]


@compiled
def _quantize_to_digits(
    first: int, last: int, y: Array, sigma: Array, num_digits: int, base: int, lanes: Array, energy: Array, kept: Array
) -> None:
    block, n = y.shape[1], lanes.shape[1]
    digits, spare = np.ones(num_digits * n, np.uint8), np.empty(block, _F32)
    for t in range(first, last):
        energy[t], kept[t] = _ternarise(y[t], sigma[t], digits, spare)
        lane = lanes[t]
        lane[:] = 0
        for d in range(num_digits - 1, -1, -1):
            for i in range(n):
                lane[i] = lane[i] * base + digits[d * n + i]


@compiled
def _sums_of_digits(first: int, last: int, lanes: Array, num_digits: int, base: int, out: Array) -> None:
    """Halves of a lane are exact in float64, whose division by the base is quick."""
    block, n, low = out.shape[1], lanes.shape[1], num_digits // 2
    half, zero = base**low, np.float64(base // 2)
    rest, found = np.empty(n, np.float64), np.empty(num_digits * n, _F32)
    for t in range(first, last):
        for part in range(2):
            for i in range(n):
                rest[i] = lanes[t, i] // half if part else lanes[t, i] % half
            for d in range(low if part else 0, num_digits if part else low):
                for i in range(n):
                    quotient = np.floor(rest[i] / base)
                    found[d * n + i] = rest[i] - quotient * base - zero
                    rest[i] = quotient
        out[t] = found[:block]


@compiled
def _mean_of_packed(
    first: int, last: int, packed: Array, stride: int, levels: Array, divisor: float, table: Array, y: Array
) -> None:
    block, num_ranks = y.shape[1], levels.shape[0]
    num_bytes = -(-block // TRITS_PER_BYTE)
    trits = np.empty(num_bytes * TRITS_PER_BYTE, _F32)
    for t in range(first, last):
        y[t] = _F32(0)
        for rank in range(num_ranks):
            row = packed[rank * stride + t * num_bytes :]
            for i in range(num_bytes):
                # all read before the first is written: the compiler cannot know that they do not overlap
                byte = row[i]
                a, b, c, d, e = table[byte, 0], table[byte, 1], table[byte, 2], table[byte, 3], table[byte, 4]
                trits[5 * i], trits[5 * i + 1], trits[5 * i + 2], trits[5 * i + 3], trits[5 * i + 4] = a, b, c, d, e
            level = levels[rank, t]
            for i in range(block):
                y[t, i] += level * trits[i]
        for i in range(block):
            y[t, i] /= divisor


class NumbaBucket:
    """The passes over one bucket; see `interface.BucketKernels`."""

    def __init__(self, layout: BucketLayout, seed: int) -> None:
        self._seed, self._block = seed, layout.rotation_block
        rows = [
            (s.offset, s.numel, s.num_cols, s.num_rows, s.start // self._block, s.num_dims, s.first_factor, s.name_hash)
            for s in layout.compressed
        ]
        self._num_factors = layout.num_factors
        self._table = np.array([*rows, (layout.bundle, *[0] * 7)], np.int64)
        counts = [s.num_dims // self._block for s in layout.compressed]
        self._owner = np.repeat(np.arange(len(rows), dtype=np.int32), counts)

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        found_S = torch.zeros(self._num_factors, dtype=torch.float64)
        _mean_squares(_bits(bucket_N), self._table, found_S.numpy())
        return found_S.bfloat16().float()

    def keys(self, step: int) -> Keys:
        return Keys(step, torch.empty(0, dtype=torch.int32))

    def encode(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> Tensor:
        y_TK = _floats(len(self._owner), self._block)
        bucket, factors = _bits(bucket_N), _array(factors_S)
        _share(_encode, len(y_TK), bucket, factors, self._table, self._owner, keys.step, self._seed, y_TK.numpy())
        return y_TK

    def decode_(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys, y_TK: Tensor, gain: float = 1.0) -> None:
        bucket = _bits(bucket_N)
        tables = bucket, _array(factors_S), self._table, self._owner
        _share(_decode, len(y_TK), *tables, keys.step, self._seed, y_TK.numpy(), np.float32(gain))
        if bucket_N.dtype not in _IN_PLACE:
            bucket_N.copy_(torch.from_numpy(bucket))


class NumbaKernels:
    """The numba backend; see `interface.Kernels`."""

    name = "numba"

    def for_bucket(self, layout: BucketLayout, seed: int, device: torch.device) -> NumbaBucket:
        return NumbaBucket(layout, seed)

    def rotate(self, y_TK: Tensor) -> Tensor:
        rotated_TK = torch.empty_like(y_TK)
        _share(_rotate_rows, len(y_TK), y_TK.numpy(), rotated_TK.numpy())
        return rotated_TK

    def quantize(self, y_TK: Tensor, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = y_TK.shape
        packed_TP = torch.empty(num_rows, -(-block // TRITS_PER_BYTE), dtype=torch.uint8)
        energy_T, kept_T = _floats(num_rows), _floats(num_rows)
        found = packed_TP.numpy(), energy_T.numpy(), kept_T.numpy()
        _share(_quantize, num_rows, y_TK.numpy(), _array(sigma_T), *found)
        return packed_TP, energy_T, kept_T

    def quantize_to_digits(self, y_TK: Tensor, sigma_T: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = y_TK.shape
        digits = digits_per_lane(num_ranks)
        lanes_TL = torch.empty(num_rows, -(-block // digits), dtype=torch.int64)
        energy_T, kept_T = _floats(num_rows), _floats(num_rows)
        found = lanes_TL.numpy(), energy_T.numpy(), kept_T.numpy()
        base = 2 * num_ranks + 1
        _share(_quantize_to_digits, num_rows, y_TK.numpy(), _array(sigma_T), digits, base, *found)
        return lanes_TL, energy_T, kept_T

    def sums_of_digits(self, lanes_TL: Tensor, block: int, num_ranks: int) -> Tensor:
        sums_TK = _floats(len(lanes_TL), block)
        tables = digits_per_lane(num_ranks), 2 * num_ranks + 1, sums_TK.numpy()
        _share(_sums_of_digits, len(lanes_TL), lanes_TL.numpy(), *tables)
        return sums_TK

    def mean_of_packed(self, packed_WTP: Tensor, levels_WT: Tensor | None, block: int) -> Tensor:
        num_ranks, num_rows, num_bytes = packed_WTP.shape
        stride = packed_WTP.stride(0)
        y_TK = _floats(num_rows, block)
        if not num_rows:
            return y_TK
        flat = packed_WTP.as_strided(((num_ranks - 1) * stride + num_rows * num_bytes,), (1,))
        if levels_WT is None:
            levels, divisor = _floats(num_ranks, num_rows).fill_(1), 1
        else:
            levels, divisor = levels_WT.float().contiguous(), num_ranks
        tables = stride, levels.numpy(), np.float32(divisor), trits_of_byte(packed_WTP.device).numpy()
        _share(_mean_of_packed, num_rows, flat.numpy(), *tables, y_TK.numpy())
        return y_TK


def _bits(bucket_N: Tensor) -> Array:
    """What kernels take for a bucket: itself as float32 or as bits of bfloat16, or else a copy in float32."""
    if bucket_N.dtype == torch.bfloat16:
        bits: Array = bucket_N.view(torch.int16).numpy().view(np.uint16)
        return bits
    return _array(bucket_N.float())


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


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
