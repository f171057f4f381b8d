"""Sparse block codes: of every n elements of a row the one of largest size alone becomes a trit, all others are 0.

A block is sent as the place of its trit and the trit's sign, 1 + log2 n bits. At as many bits that is about half the
noise of bundling: sums of slots throw away what a maximum finds.

A maximum finds little among equal sizes. Rotation blocks are some rows of a matrix, and if one of them prevails, as the
rows of frequent tokens do, what a power of two of elements apart lies in the rotated block has one size. So codes are
diagonals: of n runs of S elements code s has the s-th of the first, the s+1st of the second, and so on, one place more
after every S runs and after every S**2. One pass over the row finds the largest of all codes side by side.

Sources: Laiho et al. 2015, "High-dimensional computing with sparse vectors" (sparse block codes); Andoni et al. 2015,
arXiv:1509.02897 (the rotated cross-polytope as a quantiser); the level is `ternary.level`.

Shape letters: T rotation blocks of K elements, n elements of a block code, S = K / n block codes in P bytes.
"""

import torch
from torch import Tensor

from vsa_ddp.rates import code_bits
from vsa_ddp.ternary import row_sums

GROUP = 8
"""Block codes that fill whole bytes, as many as each has bits; a row has at least so many."""


def row_bytes(block: int, sparsity: int) -> int:
    """Bytes of a row of `block` elements."""
    return block // (sparsity * GROUP) * code_bits(sparsity)


def diagonals(block: int, sparsity: int, device: torch.device) -> Tensor:
    """Where in a row the elements of codes lie. Shapes: -> (n, S) int64, each of 0..K - 1 once."""
    run_n1, num = torch.arange(sparsity, device=device)[:, None], block // sparsity
    return run_n1 * num + (torch.arange(num, device=device) + _turn(run_n1, num)) % num


def _turn(run: Tensor, num: int) -> Tensor:
    """How many places on a run's first code lies."""
    return run + run // num + run // num**2


def quantize_sparsely(y_TK: Tensor, sparsity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep of every n elements the largest, the first of equal ones.

    Returns the block codes, place + n * (1 if it is negative), and what `ternary.level` wants: each row's energy and
    the sum of the sizes kept. Shapes: (T, K) float32 -> (T, S) uint8, (T,) float32, (T,) float32. K a power of two.
    """
    where_nS = diagonals(y_TK.shape[1], sparsity, y_TK.device)
    y_TnS = y_TK.index_select(1, where_nS.flatten()).view(-1, *where_nS.shape)
    # sizes as integers, which order as their bits do, each with its place behind it: no two are equal
    place_n1 = torch.arange(sparsity, device=y_TK.device)[:, None]
    size = y_TnS.view(torch.int32) & 0x7FFFFFFF
    place_TS = 127 - ((size.long() << 7 | 127 - place_n1).amax(1) & 127)
    kept_TS = y_TnS.gather(1, place_TS[:, None])[:, 0]
    codes_TS = place_TS + (kept_TS < 0) * sparsity
    return codes_TS.to(torch.uint8), row_sums(y_TK.square()), row_sums(kept_TS.abs())


def pack_codes(codes_TS: Tensor, sparsity: int) -> Tensor:
    """Eight block codes of b bits to b bytes, the first in the lowest bits. Exact: `unpack_codes` inverts it.

    Shapes: (T, S) uint8 -> (T, P) uint8, S a multiple of 8.
    """
    bits = code_bits(sparsity)
    codes = codes_TS.view(len(codes_TS), codes_TS.shape[1] // GROUP, GROUP).long()
    words_T1: Tensor = (codes << torch.arange(GROUP, device=codes.device) * bits).sum(2, keepdim=True)
    return words_T1.view(torch.uint8)[..., :bits].flatten(1)


def unpack_codes(packed_TP: Tensor, sparsity: int) -> Tensor:
    """The trits of rows. Shapes: (T, P) uint8 -> (T, K) float32 of {-1, 0, +1}."""
    bits, device = code_bits(sparsity), packed_TP.device
    groups = packed_TP.reshape(len(packed_TP), packed_TP.shape[1] // bits, bits)
    words = torch.nn.functional.pad(groups, (0, 8 - bits)).view(torch.int64)
    codes_TS = (words >> torch.arange(GROUP, device=device) * bits & 2 * sparsity - 1).flatten(1).to(torch.uint8)
    num = codes_TS.shape[1]
    element_K = torch.arange(num * sparsity, device=device)
    run_K = element_K // num
    codes_TK = codes_TS.index_select(1, (element_K - _turn(run_K, num)) % num)
    return (codes_TK % sparsity == run_K) * (1 - 2 * (codes_TK >= sparsity).float())
