# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the triton kernels share: functions of one row of a hypervector, in registers.

Every product and sum is the one that `interface` prescribes, if none is contracted with another: launch with
`enable_fp_fusion=False`.

Shape letters: as in `interface`; n = K / 32 words of a row's keys. STAGES is log2 K.
"""

import triton
import triton.language as tl

from vsa_ddp.hypervector import KEYS_PER_COUNTER
from vsa_ddp.packing import TRITS_PER_BYTE
from vsa_ddp.ternary import THRESHOLD

PARAMETER_COLUMNS = tl.constexpr(8)
_KEYS_PER_COUNTER = tl.constexpr(KEYS_PER_COUNTER)
_PER_BYTE = tl.constexpr(TRITS_PER_BYTE)
_THRESHOLD = tl.constexpr(THRESHOLD)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 below 2**22 that it is added to, and taken from again, is rounded half to even."""


@triton.jit
def parameter_of_row(table, owner, row, ALIGN: tl.constexpr):
    """The columns of the table of parameters, see `TritonBucket`, int64."""
    p = table + tl.load(owner + row).to(tl.int64) * PARAMETER_COLUMNS
    offset = tl.multiple_of(tl.load(p), ALIGN)
    return (
        offset,
        tl.load(p + 1),
        tl.load(p + 2),
        tl.load(p + 3),
        tl.load(p + 4),
        tl.load(p + 5),
        tl.load(p + 6),
        tl.load(p + 7),
    )


@triton.jit
def length_of_row(numel, start, K: tl.constexpr, ALIGN: tl.constexpr):
    """How many elements of a parameter lie in a row from `start` on, int32."""
    return tl.multiple_of(tl.minimum(numel - start, K).to(tl.int32), ALIGN)


@triton.jit
def bind(x_K, start, stream, step, seed, K: tl.constexpr):
    """x times the keys of a row, by their signs; see `hypervector.key_words` and `hypervector.unpack_keys`."""
    n: tl.constexpr = K // 32
    counter = (start // _KEYS_PER_COUNTER).to(tl.uint32) + tl.arange(0, n // 4).to(tl.uint32)
    step = step.to(tl.uint64)
    a, b, c, d = tl.philox(seed, counter, stream.to(tl.uint32), step.to(tl.uint32), (step >> 32).to(tl.uint32))
    words_n = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (n,))
    signs = (words_n[None, :] << (31 - tl.arange(0, 32)).to(tl.uint32)[:, None]) & 0x80000000
    return (x_K.to(tl.uint32, bitcast=True) ^ tl.reshape(signs, (K,))).to(tl.float32, bitcast=True)


@triton.jit
def whiten(x_K, factors, num_rows, num_cols, start, length, K: tl.constexpr):
    """x times its row factors, then times its column factors."""
    i = tl.arange(0, K)
    row, col = start // num_cols, start % num_cols
    # elements past the end of the first row, below 2**14: so few that float32 divides them exactly, and sooner
    beyond = i - tl.minimum(num_cols - col, K).to(tl.int32)
    rows = tl.where(beyond < 0, 0, 1 + ((beyond + 0.5) * (1.0 / num_cols.to(tl.float32))).to(tl.int32))
    cols = i - rows * num_cols.to(tl.int32)
    row_K = tl.load(factors + row + rows, mask=i < length, other=0.0)
    col_K = tl.load(factors + num_rows + col + cols, mask=i < length, other=0.0)
    return x_K * row_K * col_K


@triton.jit
def rotate(y_K, K: tl.constexpr, STAGES: tl.constexpr):
    """`hypervector.rotate` of a row."""
    peak = tl.max(y_K.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    shift = tl.minimum(24 - STAGES - ((peak >> 23) - 126), 116)
    scale = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    unit = ((127 - shift) << 23).to(tl.float32, bitcast=True) * K**-0.5
    y_K = (y_K * scale + _ROUND) - _ROUND
    for _ in tl.static_range(STAGES):
        # after all stages of this one geometry every element is back at its place
        a, b = tl.split(tl.trans(tl.reshape(y_K, (2, K // 2))))
        y_K = tl.reshape(tl.join(a + b, a - b), (K,))
    return y_K * unit


@triton.jit
def row_sum(x_K, K: tl.constexpr, STAGES: tl.constexpr):
    """`ternary.row_sums` of a row."""
    for stage in tl.static_range(1, STAGES):
        x_K = tl.sum(tl.reshape(x_K, (2, K >> stage)), 0)
    return tl.sum(x_K, 0)


@triton.jit
def ternarise(y_K, sigma, energy, kept, row, K: tl.constexpr, STAGES: tl.constexpr):
    """Trits plus one, int32. Stores the row's energy and what was kept of it. Its own sigma if none is given."""
    total = row_sum(y_K * y_K, K, STAGES)
    threshold = _THRESHOLD * (tl.sqrt_rn(total * (1.0 / K)) if sigma is None else tl.load(sigma + row))
    size_K = tl.abs(y_K)
    tl.store(energy + row, total)
    tl.store(kept + row, row_sum(tl.where(size_K > threshold, size_K, 0.0), K, STAGES))
    return 1 + (y_K > threshold).to(tl.int32) - (y_K < -threshold).to(tl.int32)


@triton.jit
def digits_at(digits_K, index, K: tl.constexpr):
    """Some of a row's trits plus one; 1 beyond the row."""
    return tl.where(index < K, tl.gather(digits_K, tl.minimum(index, K - 1), 0), 1)


@triton.jit
def encode_row(gradient, step, seed, t, K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr):
    """A row of `interface.Gradient`."""
    bucket, factors, table, owner = gradient
    i = tl.arange(0, K)
    offset, numel, num_rows, num_cols, first, count, factor, stream = parameter_of_row(table, owner, t, ALIGN)
    y_K = tl.zeros((K,), tl.float32)
    for slot in range(tl.cdiv(numel - (t - first) * K, count * K).to(tl.int32)):
        start = (slot * count + t - first) * K
        length = length_of_row(numel, start, K, ALIGN)
        x_K = tl.load(bucket + (offset + start) + i, mask=i < length, other=0.0).to(tl.float32)
        if factors is not None:
            x_K = whiten(x_K, factors + factor, num_rows, num_cols, start, length, K)
        y_K += bind(x_K, start, stream, step, seed, K)
    return rotate(y_K, K, STAGES)


@triton.jit
def row_of(rows, gradient, step, seed, t, K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr):
    """A row of `interface.Rows`: of floats, or of a gradient if there are none."""
    if rows is not None:
        y_K = tl.load(rows + t * K + tl.arange(0, K))
    else:
        y_K = encode_row(gradient, step, seed, t, K, STAGES, ALIGN)
    return y_K


@triton.jit
def turn(run, n: tl.constexpr):
    """By how much a run of n elements is turned; see `sparse.diagonals`."""
    return run + run // n + run // (n * n)


@triton.jit
def largest(y_K, energy, kept, row, K: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr):
    """`sparse.quantize_sparsely` of a row: block codes, int32. Stores the row's energy and what was kept of it."""
    n: tl.constexpr = K >> (BITS - 1)
    element = tl.arange(0, K)
    turned_K = tl.gather(y_K, element // n * n + (element + turn(element // n, n)) % n, 0)
    size_nS = tl.reshape(turned_K.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (1 << (BITS - 1), n))
    size_S, place_S = tl.max(size_nS, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(energy + row, row_sum(y_K * y_K, K, STAGES))
    tl.store(kept + row, row_sum(size_S.to(tl.float32, bitcast=True), n, STAGES - BITS + 1))
    y_S = tl.gather(turned_K, place_S * n + tl.arange(0, n), 0)
    return place_S + tl.where(y_S < 0, 1 << (BITS - 1), 0)


@triton.jit
def packed_codes(codes_S, byte, n: tl.constexpr, BITS: tl.constexpr):
    """Some bytes of `sparse.pack_codes` of a row, int32."""
    first = byte * 8 // BITS
    found = tl.zeros_like(byte)
    for i in tl.static_range((BITS + 14) // BITS):
        s = first + i
        shift = s * BITS - byte * 8
        code = tl.where(s < n, tl.gather(codes_S, tl.minimum(s, n - 1), 0), 0)
        found |= tl.where(shift < 0, code >> tl.maximum(-shift, 0), code << tl.minimum(tl.maximum(shift, 0), 8))
    return found & 255


@triton.jit
def trits_of_codes(packed, K: tl.constexpr, BITS: tl.constexpr):
    """`sparse.unpack_codes` of a row."""
    n: tl.constexpr = K >> (BITS - 1)
    element = tl.arange(0, K)
    run = element // n
    bit = (element - turn(run, n) & n - 1) * BITS
    low = tl.load(packed + bit // 8).to(tl.int32)
    # a code that ends with a byte needs no other, which might lie beyond the packet
    high = tl.load(packed + bit // 8 + 1, mask=bit % 8 + BITS > 8, other=0).to(tl.int32)
    code = (low | high << 8) >> bit % 8
    sign = (1 - (code >> (BITS - 1) & 1) * 2).to(tl.float32)
    return tl.where((code & ((1 << (BITS - 1)) - 1)) == run, sign, 0.0)


@triton.jit
def sum_packed(packets, num_ranks, t, K: tl.constexpr, BITS: tl.constexpr):
    """The ranks' trits times their levels, or times one if there are none. BITS of a block code, 0 for all trits."""
    packed, rank_stride, levels, level_rank_stride, level_stride = packets
    element = tl.arange(0, K)
    place = element % _PER_BYTE
    # byte // 3**place is byte * inverse >> 16, for each of 0..255
    inverse = tl.where(place == 0, 65536, tl.where(place == 1, 21846, tl.where(place == 2, 7282, 2428)))
    inverse = tl.where(place == 4, 810, inverse)
    packed += t * ((K >> (BITS - 1)) // 8 * BITS if BITS else tl.cdiv(K, _PER_BYTE))
    if levels is not None:
        levels += t * level_stride
    y_K = tl.zeros((K,), tl.float32)
    for _ in range(num_ranks):
        if BITS:
            x_K = trits_of_codes(packed, K, BITS)
        else:
            byte = tl.load(packed + element // _PER_BYTE).to(tl.int32)
            x_K = ((byte * inverse >> 16) % 3 - 1).to(tl.float32)
        packed += rank_stride
        if levels is not None:
            x_K *= tl.load(levels).to(tl.float32)
            levels += level_rank_stride
        y_K += x_K
    return y_K


@triton.jit
def sums_of_digits(lanes, t, K: tl.constexpr, DIGITS: tl.constexpr, BASE: tl.constexpr, L: tl.constexpr):
    """`packing.unpack_digits` of a row."""
    element = tl.arange(0, K)
    digit, power = element // L, tl.full((K,), 1, tl.uint64)
    for i in tl.static_range(DIGITS - 1):
        power = tl.where(i < digit, power * BASE, power)
    lane_K = tl.load(lanes + t * L + element % L).to(tl.uint64)
    return ((lane_K // power % BASE).to(tl.int32) - BASE // 2).to(tl.float32)


@triton.jit
def mean_row(
    received,
    num_ranks,
    t,
    K: tl.constexpr,
    BITS: tl.constexpr,
    DIGITS: tl.constexpr,
    BASE: tl.constexpr,
    L: tl.constexpr,
):
    """A row of `interface.Received`: of floats, of lanes or of packed trits, whichever there is."""
    rows, packets, lanes, shared = received
    if rows is not None:
        y_K = tl.load(rows + t * K + tl.arange(0, K))
    else:
        if lanes is not None:
            y_K = sums_of_digits(lanes, t, K, DIGITS, BASE, L)
        else:
            y_K = sum_packed(packets, num_ranks, t, K, BITS)
        if shared is not None:
            y_K *= tl.load(shared + t)
        y_K = tl.div_rn(y_K, num_ranks.to(tl.float32))
    return y_K


@triton.jit
def bfloat16_bits(x):
    """x rounded half to even to bfloat16, as int16: triton's interpreter rounds otherwise."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
