"""MAP algebra on torch tensors: +-1 keys, bind by product, bundle by sum, and the rotation. Names as in torchhd.

Shape letters: B slots, D dimensions, T rotation blocks of K elements, C = D / 128 key counters.
"""

from functools import cache

import torch
from torch import Tensor

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


def key_bits(counter_BC: Tensor, stream_BC: Tensor, step: int, seed: int) -> Tensor:
    """The keys of one step, eight to a byte, least significant bit first.

    Args: counter_BC counts the 128-key groups of a parameter, stream_BC tells parameters apart (0..2**32-1).
    Shapes: (B, C) int64 -> (B, 16 * C) uint8.
    """
    words = philox((counter_BC, stream_BC, step & _MASK, step >> 32 & _MASK), seed)
    return words.to(torch.int32).view(torch.uint8).flatten(1)


def unpack_keys(bits: Tensor) -> Tensor:
    """+-1 keys from key bits: bit 1 is -1. Shapes: (..., n) uint8 -> (..., 8 * n) float32."""
    return _signs_of_byte(bits.device).index_select(0, bits.flatten().int()).view(*bits.shape[:-1], 8 * bits.shape[-1])


@cache
def _signs_of_byte(device: torch.device) -> Tensor:
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (1 - 2 * bits).float()


def bind(x: Tensor, keys: Tensor) -> Tensor:
    """Elementwise product. Binding twice with the same +-1 keys gives x back, exactly."""
    return x * keys


unbind = bind


def bundle(x_BD: Tensor) -> Tensor:
    """Superpose the slots: their sum. Shapes: (B, D) -> (D,)."""
    return x_BD.sum(0)


def bundle_bound_(y: Tensor, x: Tensor, keys: Tensor) -> Tensor:
    """y += bind(x, keys), in place and in one pass: one more slot of a bundle."""
    return y.addcmul_(x, keys)


def unbundle(y_D: Tensor, num_slots: int) -> Tensor:
    """Every slot's noisy view of a bundle: the bundle itself, not copied. Shapes: (D,) -> (B, D)."""
    return y_D.expand(num_slots, -1)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The Sylvester Hadamard matrix, unnormalised. Shapes: -> (size, size) float32 of +-1; size a power of two."""
    h = torch.ones(1, 1, dtype=torch.float32, device=device)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def rotate(y_TK: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each row; its own inverse. With random signs it makes rows Gaussian.

    Two products with small Hadamard matrices (K = L * R), faster than butterflies in eager torch.
    Shapes: (T, K) float32 -> (T, K); K a power of two. A row's bits do not depend on the other rows.
    """
    num_blocks, block = y_TK.shape
    left = 1 << (block.bit_length() - 1) // 2
    right = block // left
    y_TLR = y_TK.view(num_blocks, left, right)
    # Under autocast the same product would be float32 in one thread and bfloat16 in another
    with torch.autocast(y_TK.device.type, enabled=False):
        rotated = hadamard(left, y_TK.device) @ y_TLR @ hadamard(right, y_TK.device)
    return rotated.view(num_blocks, block).mul_(block**-0.5)
