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
from vsa_ddp.kernels.interface import Keys
from vsa_ddp.kernels.triton_rows import (
    bfloat16_bits,
    bind,
    digits_at,
    length_of_row,
    measure,
    parameter_of_row,
    rotate,
    whiten,
)
from vsa_ddp.layout import BucketLayout
from vsa_ddp.packing import TRITS_PER_BYTE
from vsa_ddp.whitening import mean_squares

_PER_BYTE = tl.constexpr(TRITS_PER_BYTE)
_LANES, _ELEMENTS = 256, 1024
"""At most so many to a program that needs no whole rows."""


@triton.jit(do_not_specialize=["step", "seed"])
def _encode(bucket, factors, table, owner, step, seed, y, K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr):
    t, i = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    offset, numel, num_rows, num_cols, first, count, factor, stream = parameter_of_row(table, owner, t, ALIGN)
    y_K = tl.zeros((K,), tl.float32)
    for slot in range(tl.cdiv(numel - (t - first) * K, count * K).to(tl.int32)):
        start = (slot * count + t - first) * K
        length = length_of_row(numel, start, K, ALIGN)
        x_K = tl.load(bucket + (offset + start) + i, mask=i < length, other=0.0).to(tl.float32)
        if factors is not None:
            x_K = whiten(x_K, factors + factor, num_rows, num_cols, start, length, K)
        y_K += bind(x_K, start, stream, step, seed, K)
    tl.store(y + t * K + i, rotate(y_K, K, STAGES))


@triton.jit(do_not_specialize=["step", "seed"])
def _decode(
    bucket, factors, table, owner, step, seed, y, gain, K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr
):
    t, i = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    offset, numel, num_rows, num_cols, first, count, factor, stream = parameter_of_row(table, owner, t, ALIGN)
    y_K = rotate(tl.load(y + t * K + i), K, STAGES) * gain
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


@triton.jit
def _rotate(y, rotated, K: tl.constexpr, STAGES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * K + tl.arange(0, K)
    tl.store(rotated + at, rotate(tl.load(y + at), K, STAGES))


@triton.jit
def _quantize(
    y, sigma, packed, energy, kept, K: tl.constexpr, STAGES: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    t, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    threshold = measure(y + t * K, sigma, energy, kept, t, K, STAGES)
    bytes_P = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(_PER_BYTE):
        bytes_P += digits_at(y + t * K, j * _PER_BYTE + i, threshold, K) * 3**i
    tl.store(packed + t * P + j, bytes_P.to(tl.uint8), mask=j < P)


@triton.jit
def _quantize_to_digits(
    y,
    sigma,
    lanes,
    energy,
    kept,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    DIGITS: tl.constexpr,
    BASE: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    threshold = measure(y + t * K, sigma, energy, kept, t, K, STAGES)
    lanes_L = tl.zeros((BLOCK,), tl.int64)
    for i in tl.static_range(DIGITS):
        lanes_L = lanes_L * BASE + digits_at(y + t * K, j + (DIGITS - 1 - i) * L, threshold, K)
    tl.store(lanes + t * L + j, lanes_L, mask=j < L)


@triton.jit
def _sums_of_digits(
    lanes,
    sums,
    num_lanes,
    K: tl.constexpr,
    DIGITS: tl.constexpr,
    BASE: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(lanes + at, mask=at < num_lanes, other=0).to(tl.uint64)
    for i in tl.static_range(DIGITS):
        quotient = rest // BASE
        trits = (rest - quotient * BASE).to(tl.int32) - BASE // 2
        element = at % L + i * L
        tl.store(sums + at // L * K + element, trits.to(tl.float32), mask=(at < num_lanes) & (element < K))
        rest = quotient


@triton.jit
def _mean_of_packed(
    packed,
    rank_stride,
    levels,
    level_rank_stride,
    level_stride,
    num_ranks,
    divisor,
    y,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    t = program // (K // BLOCK)
    element = (program % (K // BLOCK) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    place = element % _PER_BYTE
    # byte // 3**place is byte * inverse >> 16, for each of 0..255
    inverse = tl.where(place == 0, 65536, tl.where(place == 1, 21846, tl.where(place == 2, 7282, 2428)))
    inverse = tl.where(place == 4, 810, inverse)
    packed += t * P
    if levels is not None:
        levels += t * level_stride
    y_K = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_ranks):
        byte = tl.load(packed + element // _PER_BYTE).to(tl.int32)
        x_K = ((byte * inverse >> 16) % 3 - 1).to(tl.float32)
        packed += rank_stride
        if levels is not None:
            x_K *= tl.load(levels).to(tl.float32)
            levels += level_rank_stride
        y_K += x_K
    if levels is not None:
        y_K = tl.div_rn(y_K, divisor)
    tl.store(y + t * K + element, y_K)


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
        self._align = math.gcd(16, *(n for s in layout.compressed for n in (s.offset, s.numel)))
        self._no_words = torch.empty(0, dtype=torch.int32, device=device)

    def mean_squares(self, bucket_N: Tensor) -> Tensor:
        return mean_squares(self._layout, bucket_N)

    def keys(self, step: int) -> Keys:
        return Keys(step, self._no_words)

    def encode(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys) -> Tensor:
        y_TK = _floats(bucket_N, self._num_rows, self._block)
        tables = factors_S, self._table, self._owner, keys.step, self._seed
        _launch(_encode, len(y_TK), bucket_N, *tables, y_TK, **_by_rows(self._block), ALIGN=self._align)
        return y_TK

    def decode_(self, bucket_N: Tensor, factors_S: Tensor | None, keys: Keys, y_TK: Tensor, gain: float = 1.0) -> None:
        target_N = bucket_N.view(torch.int16) if bucket_N.dtype == torch.bfloat16 else bucket_N
        tables = factors_S, self._table, self._owner, keys.step, self._seed
        sizes = {**_by_rows(self._block), "ALIGN": self._align}
        _launch(_decode, len(y_TK), target_N, *tables, y_TK.contiguous(), float(gain), **sizes)


class TritonKernels:
    """The triton backend; see `interface.Kernels`."""

    name = "triton"

    def for_bucket(self, layout: BucketLayout, seed: int, device: torch.device) -> TritonBucket:
        return TritonBucket(layout, seed, device)

    def rotate(self, y_TK: Tensor) -> Tensor:
        num_rows, block = y_TK.shape
        rotated_TK = _floats(y_TK, num_rows, block)
        _launch(_rotate, num_rows, y_TK.contiguous(), rotated_TK, **_by_rows(block))
        return rotated_TK

    def quantize(self, y_TK: Tensor, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = y_TK.shape
        num_bytes = -(-block // TRITS_PER_BYTE)
        packed_TP = y_TK.new_empty(num_rows, num_bytes, dtype=torch.uint8)
        energy_T, kept_T = _floats(y_TK, num_rows), _floats(y_TK, num_rows)
        sigma_T = None if sigma_T is None else sigma_T.contiguous()
        tensors = y_TK.contiguous(), sigma_T, packed_TP, energy_T, kept_T
        _launch(_quantize, num_rows, *tensors, **_by_rows(block), P=num_bytes, BLOCK=_power_of_two(num_bytes))
        return packed_TP, energy_T, kept_T

    def quantize_to_digits(self, y_TK: Tensor, sigma_T: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, block = y_TK.shape
        sizes = _of_lanes(block, num_ranks)
        lanes_TL = y_TK.new_empty(num_rows, sizes["L"], dtype=torch.int64)
        energy_T, kept_T = _floats(y_TK, num_rows), _floats(y_TK, num_rows)
        tensors = y_TK.contiguous(), sigma_T.contiguous(), lanes_TL, energy_T, kept_T
        sizes |= _by_rows(block)
        _launch(_quantize_to_digits, num_rows, *tensors, **sizes, BLOCK=_power_of_two(sizes["L"]))
        return lanes_TL, energy_T, kept_T

    def sums_of_digits(self, lanes_TL: Tensor, block: int, num_ranks: int) -> Tensor:
        sums_TK = _floats(lanes_TL, len(lanes_TL), block)
        num_lanes = lanes_TL.numel()
        sizes = {**_of_lanes(block, num_ranks), "K": block, "BLOCK": _LANES}
        _launch(_sums_of_digits, -(-num_lanes // _LANES), lanes_TL.contiguous(), sums_TK, num_lanes, **sizes)
        return sums_TK

    def mean_of_packed(self, packed_WTP: Tensor, levels_WT: Tensor | None, block: int) -> Tensor:
        num_ranks, num_rows, num_bytes = packed_WTP.shape
        y_TK = _floats(packed_WTP, num_rows, block)
        size = min(block, _ELEMENTS)
        levels = (None, 0, 0) if levels_WT is None else (levels_WT, *levels_WT.stride())
        args = packed_WTP, packed_WTP.stride(0), *levels, num_ranks, float(num_ranks), y_TK
        _launch(_mean_of_packed, num_rows * block // size, *args, K=block, P=num_bytes, BLOCK=size)
        return y_TK


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _by_rows(block: int) -> dict[str, int]:
    """Sizes of a kernel with a program for each row."""
    # 16 elements to a thread: with 32, encode takes 215 registers on Hopper, and too few rows are in flight; with 8,
    # more threads draw the same keys. A row of 16384 then takes all 32 warps that a program may have
    return {"K": block, "STAGES": block.bit_length() - 1, "num_warps": max(1, block // 512)}


def _of_lanes(block: int, num_ranks: int) -> dict[str, int]:
    """Sizes of a row as lanes of digits; see `packing.pack_digits`."""
    digits = digits_per_lane(num_ranks)
    return {"DIGITS": digits, "BASE": 2 * num_ranks + 1, "L": -(-block // digits)}


def _power_of_two(number: int) -> int:
    """The least that is not below."""
    return 1 << (number - 1).bit_length()


def _launch(kernel: Any, num_programs: int, *args: Any, **sizes: int) -> None:
    """Run a kernel on the device of its first argument. A fused product and sum would round otherwise."""
    if not num_programs:
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(num_programs,)](*args, **sizes, enable_fp_fusion=False)
