"""Trits to bytes and back, trits to summable digits and back, and a packet to bytes and back.

The packet that leaves a rank: four parts in this order, little-endian, each filled with zeros to a multiple of 8 bytes
so that the next starts aligned. No header: every rank knows the layout of the bucket.

| part   | bytes        | what                                                                              |
|--------|--------------|-----------------------------------------------------------------------------------|
| levels | 2 * T        | bfloat16: the value of trit +1 in each rotation block                             |
| scales | 2 * S        | bfloat16: means of this rank's squared gradient over rows and columns, or nothing |
| exact  | itemsize * E | the small parameters' gradient in the bucket's own dtype                          |
| trits  | ceil(D / 5)  | five trits to a byte, base 3                                                      |

Shape letters: D dimensions (trits), T rotation blocks of K (D = T * K), E exact elements, S scales, P bytes.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vsa_ddp.cost import digits_per_lane

TRITS_PER_BYTE = 5
_ALIGN = 8


def pack_trits(trits_D: Tensor) -> Tensor:
    """Pack trits {-1, 0, +1} into bytes, five to a byte. Exact: `unpack_trits` inverts it.

    Byte value = sum((trit[i] + 1) * 3**i for i in 0..4), 0..242. A short last byte is filled with trit 0.

    Shapes: (..., D) int8 -> (..., ceil(D / 5)) uint8, on the same device.
    Raises: TypeError if the dtype is not int8. Values outside {-1, 0, +1} are not checked (hot path).
    """
    if trits_D.dtype != torch.int8:
        raise TypeError(f"trits must be int8, got {trits_D.dtype}; convert them with .to(torch.int8).")
    fill = -trits_D.shape[-1] % TRITS_PER_BYTE
    digits = torch.nn.functional.pad(trits_D + 1, (0, fill), value=1).view(torch.uint8)
    digits = digits.view(*digits.shape[:-1], digits.shape[-1] // TRITS_PER_BYTE, TRITS_PER_BYTE)
    packed: Tensor = digits[..., 0].clone()
    for i in range(1, TRITS_PER_BYTE):
        packed.add_(digits[..., i], alpha=3**i)
    return packed


def unpack_trits(packed: Tensor, num_trits: int) -> Tensor:
    """Invert `pack_trits`. Shapes: (..., ceil(D / 5)) uint8 -> (..., D) float32, which what follows calculates in.

    Raises: ValueError if the number of bytes is not that of `num_trits` trits.
    """
    num_bytes = -(-num_trits // TRITS_PER_BYTE)
    if packed.shape[-1] != num_bytes:
        raise ValueError(f"{num_trits} trits take {num_bytes} bytes, got {packed.shape[-1]}.")
    trits = trits_of_byte(packed.device).index_select(0, packed.flatten().int())
    return trits.view(*packed.shape[:-1], num_bytes * TRITS_PER_BYTE)[..., :num_trits]


@cache
def trits_of_byte(device: torch.device) -> Tensor:
    """The table that unpacks a byte. Shapes: -> (256, 5) float32. Cached by device."""
    byte = torch.arange(256, device=device)[:, None]
    return (byte // 3 ** torch.arange(TRITS_PER_BYTE, device=device) % 3 - 1).float()


@dataclass(frozen=True)
class Packet:
    """What one rank has to say about one bucket. Shapes: (T, K) trits, (T,) and (S,) bfloat16, (E,) any float; or
    several packets of one shape, with more dimensions in front.

    With a sigma that the ranks share, `levels_T` is (2T,): each row's energy, then what was kept of each.
    """

    trits_TK: Tensor
    levels_T: Tensor
    scales_S: Tensor
    exact_E: Tensor


def pack_digits(trits_D: Tensor, num_ranks: int) -> Tensor:
    """Trits as digits of int64 lanes that can be summed over `num_ranks` ranks without a carry. Exact.

    Lane j = sum((trit[i * lanes + j] + 1) * (2W + 1)**i): a digit is 0..2 before the sum and 0..2W after it. The last
    digits are filled with trit 0.

    Shapes: (D,) int8 -> (lanes,) int64, lanes = ceil(D / digits_per_lane(W)).
    """
    digits, base = digits_per_lane(num_ranks), 2 * num_ranks + 1
    lanes = -(-trits_D.shape[0] // digits)
    rows = torch.nn.functional.pad(trits_D + 1, (0, digits * lanes - trits_D.shape[0]), value=1).view(digits, lanes)
    packed = torch.zeros(lanes, dtype=torch.int64, device=trits_D.device)
    for row in rows.flip(0):
        packed.mul_(base).add_(row)
    return packed


def unpack_digits(packed: Tensor, num_trits: int, num_ranks: int) -> Tensor:
    """The sums of trits from the sum of the ranks' lanes. Shapes: (lanes,) int64 -> (D,) float32 of -W..W."""
    digits, base = digits_per_lane(num_ranks), 2 * num_ranks + 1
    sums = torch.empty(digits, packed.shape[0], dtype=torch.float32, device=packed.device)
    for row in sums:
        rest = packed.div(base, rounding_mode="floor")
        row.copy_(packed - rest * base - num_ranks)
        packed = rest
    return sums.view(-1)[:num_trits]


def pack_packet(packet: Packet) -> Tensor:
    """The bytes of a packet. Exact: `unpack_packet` inverts it. Shapes: -> (..., P) uint8."""
    parts = []
    for part in (packet.levels_T, packet.scales_S, packet.exact_E, pack_trits(packet.trits_TK.flatten(-2))):
        data = part.view(torch.uint8)
        parts += [data, data.new_zeros(*data.shape[:-1], -data.shape[-1] % _ALIGN)]
    return torch.cat(parts, -1)


def unpack_packet(data_P: Tensor, like: Packet) -> Packet:
    """Invert `pack_packet`, for one packet or several. Shapes: (..., P) uint8 -> as in `Packet`.

    The trits are float32. `like` is any packet of the same bucket and step: its last dimensions are read, nothing else.
    """

    def take(num_bytes: int) -> Tensor:
        nonlocal data_P
        data, data_P = data_P[..., :num_bytes], data_P[..., num_bytes + -num_bytes % _ALIGN :]
        return data

    levels_T, scales_S, exact_E = (
        take(part.shape[-1] * part.element_size()).view(part.dtype)
        for part in (like.levels_T, like.scales_S, like.exact_E)
    )
    blocks = like.trits_TK.shape[-2:]
    trits = unpack_trits(take(-(-blocks.numel() // TRITS_PER_BYTE)), blocks.numel())
    return Packet(trits.view(*trits.shape[:-1], *blocks), levels_T, scales_S, exact_E)
