# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The passes compiled for GPUs by triton, most with a program for each row of a hypervector.

The first call compiles, for some seconds; later processes take the code from triton's cache on disk. With
TRITON_INTERPRET=1 in the environment, on CPU tensors too, slowly: for tests.

Shape letters: as in `interface`. STAGES is log2 K.
"""

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from vsa_ddp.cost import digits_per_lane
from vsa_ddp.kernels.interface import Keys, Received, Rows, Summed
from vsa_ddp.kernels.triton_rows import (
    bfloat16_bits,
    bind,
    digits_at,
    encode_row,
    largest,
    length_of_row,
    mean_row,
    packed_codes,
    parameter_of_row,
    rotate,
    row_of,
    ternarise,
    whiten,
)
from vsa_ddp.layout import BucketLayout
from vsa_ddp.packing import TRITS_PER_BYTE
from vsa_ddp.rates import code_bits
from vsa_ddp.sparse import row_bytes
from vsa_ddp.whitening import mean_squares


@triton.jit(do_not_specialize=["step", "seed"])
def _encode(y, gradient, step, seed, K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    tl.store(y + t * K + tl.arange(0, K), encode_row(gradient, step, seed, t, K, STAGES, ALIGN))


@triton.jit(do_not_specialize=["step", "seed"])
def _quantize_sparsely(
    packed,
    energy,
    kept,
    rows,
    gradient,
    step,
    seed,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    BITS: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    y_K = row_of(rows, gradient, step, seed, t, K, STAGES, ALIGN)
    codes_S = largest(y_K, energy, kept, t, K, STAGES, BITS)
    bytes_P = packed_codes(codes_S, j, K >> (BITS - 1), BITS)
    tl.store(packed + t * P + j, bytes_P.to(tl.uint8), mask=j < P)


@triton.jit(do_not_specialize=["step", "seed"])
def _quantize(
    words,
    energy,
    kept,
    rows,
    gradient,
    step,
    seed,
    sigma,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    DIGITS: tl.constexpr,
    BASE: tl.constexpr,
    NEXT_WORD: tl.constexpr,
    NEXT_DIGIT: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Trits plus one as digits of words: so many trits on is the next word, or the next digit of a word."""
    t, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    y_K = row_of(rows, gradient, step, seed, t, K, STAGES, ALIGN)
    digits_K = ternarise(y_K, sigma, energy, kept, t, K, STAGES)
    words_J = tl.zeros((BLOCK,), tl.int64 if words.dtype.element_ty == tl.int64 else tl.int32)
    for i in tl.static_range(DIGITS):
        words_J = words_J * BASE + digits_at(digits_K, j * NEXT_WORD + (DIGITS - 1 - i) * NEXT_DIGIT, K)
    tl.store(words + t * NUM_WORDS + j, words_J.to(words.dtype.element_ty), mask=j < NUM_WORDS)


@triton.jit(do_not_specialize=["step", "seed", "num_ranks"])
def _decode(
    gradient,
    step,
    seed,
    received,
    num_ranks,
    gain,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    BITS: tl.constexpr,
    DIGITS: tl.constexpr,
    BASE: tl.constexpr,
    L: tl.constexpr,
):
    t, i = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    bucket, factors, table, owner = gradient
    offset, numel, num_rows, num_cols, first, count, factor, stream = parameter_of_row(table, owner, t, ALIGN)
    y_K = rotate(mean_row(received, num_ranks, t, K, BITS, DIGITS, BASE, L), K, STAGES) * gain
    for slot in range(tl.cdiv(numel - (t - first) * K, count * K).to(tl.int32)):
        start = (slot * count + t - first) * K
        length = length_of_row(numel, start, K, ALIGN)
        x_K = bind(y_K, start, stream, step, seed, K)
        if factors is not None:
            x_K = whiten(x_K, factors + factor, num_rows, num_cols, start, length, K)
        if bucket.dtype.element_ty == tl.int16:
            tl.store(bucket + (offset + start) + i, bfloat16_bits(x_K), mask=i < length)
        else:
            tl.store(bucket + (offset + start) + i, x_K.to(bucket.dtype.element_ty), mask=i < length)


@triton.jit(do_not_specialize=["num_ranks"])
def _mean(
    y,
    received,
    num_ranks,
    K: tl.constexpr,
    BITS: tl.constexpr,
    DIGITS: tl.constexpr,
    BASE: tl.constexpr,
    L: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    tl.store(y + t * K + tl.arange(0, K), mean_row(received, num_ranks, t, K, BITS, DIGITS, BASE, L))


@triton.jit
def _rotate(y, rotated, K: tl.constexpr, STAGES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * K + tl.arange(0, K)
    tl.store(rotated + at, rotate(tl.load(y + at), K, STAGES))


class TritonBucket:
    """The passes over one bucket; see `interface.BucketKernels`."""

    def __init__(self, layout: BucketLayout, seed: int, device: torch.device) -> None:
        self._layout, self._seed, self._block = layout, seed, layout.rotation_block
        counts = [s.num_dims // self._block for s in layout.compressed]
        # columns as `triton_rows.parameter_of_row` returns them
        parameters = [
            (s.offset, s.numel, s.num_rows, s.num_cols, s.start // self._block, count, s.first_factor, s.name_hash)
            for s, count in zip(layout.compressed, counts, strict=True)
        ]
        self._num_rows = sum(counts)
        self._table = _upload(np.array(parameters, np.int64), device)
        self._owner = _upload(np.repeat(np.arange(len(counts), dtype=np.int32), counts), device)
        # of how many elements all places and sizes are multiples: so many move at once
        self.align = math.gcd(16, *(n for s in layout.compressed for n in (s.offset, s.numel)))
        self._no_words = torch.empty(0, dtype=torch.int32, device=device)

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        return mean_squares(self._layout, bucket_N)

    def keys(self, step: int) -> Keys:
        return Keys(step, self._no_words)

    def arguments(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> tuple[Any, ...]:
        """What kernels take for a gradient."""
        return (bucket_N, factors_S, self._table, self._owner), keys.step, self._seed

    def encode(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> Tensor:
        y_TK = _floats(bucket_N, self._num_rows, self._block)
        gradient = self.arguments(bucket_N, factors_S, keys)
        _launch(_encode, y_TK, len(y_TK), y_TK, *gradient, **_by_rows(self._block), ALIGN=self.align)
        return y_TK

    def decode_(
        self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys, mean: Received, gain: float = 1.0
    ) -> None:
        target_N = bucket_N.view(torch.int16) if bucket_N.dtype == torch.bfloat16 else bucket_N
        received, sizes = _arrived(mean)
        sizes |= {**_by_rows(self._block), "ALIGN": self.align}
        gradient = self.arguments(target_N, factors_S, keys)
        _launch(_decode, bucket_N, self._num_rows, *gradient, *received, float(gain), **sizes)


class TritonKernels:
    """The triton backend; see `interface.Kernels`."""

    name = "triton"

    def for_bucket(self, layout: BucketLayout, seed: int, device: torch.device) -> TritonBucket:
        return TritonBucket(layout, seed, device)

    def rotate(self, y_TK: Tensor) -> Tensor:
        num_rows, block = y_TK.shape
        rotated_TK = _floats(y_TK, num_rows, block)
        _launch(_rotate, y_TK, num_rows, y_TK.contiguous(), rotated_TK, **_by_rows(block))
        return rotated_TK

    def quantize(self, rows: Rows, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        num_bytes = -(-rows.shape[1] // TRITS_PER_BYTE)
        digits = {"DIGITS": TRITS_PER_BYTE, "BASE": 3, "NEXT_WORD": TRITS_PER_BYTE, "NEXT_DIGIT": 1}
        return _quantized(rows, sigma_T, torch.uint8, num_bytes, digits)

    def quantize_sparsely(self, rows: Rows, sparsity: int) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = rows.shape
        num_bytes = row_bytes(block, sparsity)
        source, align, like = _source(rows)
        packed_TP = like.new_empty(num_rows, num_bytes, dtype=torch.uint8)
        energy_T, kept_T = _floats(like, num_rows), _floats(like, num_rows)
        sizes = {**_by_rows(block), "ALIGN": align, "P": num_bytes, "BLOCK": _power_of_two(num_bytes)}
        sizes |= {"BITS": code_bits(sparsity)}
        _launch(_quantize_sparsely, like, num_rows, packed_TP, energy_T, kept_T, *source, **sizes)
        return packed_TP, energy_T, kept_T

    def quantize_to_digits(self, rows: Rows, sigma_T: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        sizes = _of_lanes(rows.shape[1], num_ranks)
        num_lanes = sizes.pop("L")
        return _quantized(rows, sigma_T, torch.int64, num_lanes, {**sizes, "NEXT_WORD": 1, "NEXT_DIGIT": num_lanes})

    def mean(self, received: Received) -> Tensor:
        if isinstance(received, Tensor):
            return received
        like = received.levels_T if isinstance(received, Summed) else received.levels
        y_TK = _floats(like, *received.shape)
        arguments, sizes = _arrived(received)
        block = received.shape[1]
        _launch(_mean, y_TK, len(y_TK), y_TK, *arguments, **sizes, K=block, num_warps=_num_warps(block))
        return y_TK


def _quantized(
    rows: Rows, sigma_T: Tensor | None, dtype: torch.dtype, num_words: int, digits: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Trits as digits of words, the rows' energies, and what was kept of them."""
    num_rows, block = rows.shape
    source, align, like = _source(rows)
    words_TJ = like.new_empty(num_rows, num_words, dtype=dtype)
    energy_T, kept_T = _floats(like, num_rows), _floats(like, num_rows)
    sigma_T = None if sigma_T is None else sigma_T.contiguous()
    sizes = {**_by_rows(block), **digits, "ALIGN": align, "NUM_WORDS": num_words, "BLOCK": _power_of_two(num_words)}
    _launch(_quantize, like, num_rows, words_TJ, energy_T, kept_T, *source, sigma_T, **sizes)
    return words_TJ, energy_T, kept_T


def _source(rows: Rows) -> tuple[tuple[Any, ...], int, Tensor]:
    """What kernels take for rows, floats or a gradient; of how many elements all its places are multiples; a tensor."""
    if isinstance(rows, Tensor):
        return (rows.contiguous(), None, 0, 0), 1, rows
    assert isinstance(rows.bucket, TritonBucket)
    gradient = rows.bucket.arguments(rows.bucket_N, rows.factors_S, rows.keys)
    return (None, *gradient), rows.bucket.align, rows.bucket_N


def _arrived(received: Received) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What kernels take for a mean: floats, packets, lanes and levels that all share; ranks. And sizes of those."""
    no_lanes = {"BITS": 0, "DIGITS": 1, "BASE": 1, "L": 1}
    if isinstance(received, Tensor):
        return ((received.contiguous(), None, None, None), 1), no_lanes
    if isinstance(received, Summed):
        lanes_TL, levels_T = received.lanes_TL.contiguous(), received.levels_T.contiguous()
        lanes = {**no_lanes, **_of_lanes(received.shape[1], received.num_ranks)}
        return ((None, None, lanes_TL, levels_T), received.num_ranks), lanes
    levels, shared_T = (received.levels, None) if received.levels.dim() == 2 else (None, received.levels.contiguous())
    strides = (0, 0) if levels is None else levels.stride()
    assert received.packed_WTP[0].is_contiguous()
    packets = received.packed_WTP, received.packed_WTP.stride(0), levels, *strides
    codes = {**no_lanes, "BITS": code_bits(received.sparsity) if received.sparsity > 1 else 0}
    return ((None, packets, None, shared_T), len(received.packed_WTP)), codes


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _by_rows(block: int) -> dict[str, int]:
    """Sizes of a kernel with a program for each row."""
    return {"K": block, "STAGES": block.bit_length() - 1, "num_warps": _num_warps(block)}


def _num_warps(block: int) -> int:
    """Of a program that has a row."""
    # 16 elements to a thread: with 32, encode takes 215 registers on Hopper, and too few rows are in flight; with 8,
    # more threads draw the same keys. A row of 16384 then takes all 32 warps that a program may have
    return max(1, block // 512)


def _of_lanes(block: int, num_ranks: int) -> dict[str, int]:
    """Sizes of a row as lanes of digits; see `packing.pack_digits`."""
    digits = digits_per_lane(num_ranks)
    return {"DIGITS": digits, "BASE": 2 * num_ranks + 1, "L": -(-block // digits)}


def _power_of_two(number: int) -> int:
    """The least that is not below."""
    return 1 << (number - 1).bit_length()


def _launch(kernel: Any, like: Tensor, num_programs: int, *args: Any, **sizes: int) -> None:
    """Run a kernel on the device of a tensor. A fused product and sum would round otherwise."""
    if not num_programs:
        return
    device = like.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(num_programs,)](*args, **sizes, enable_fp_fusion=False)
