"""Trits to bytes and back, trits to summable digits and back, and a packet to bytes and back.

The packet that leaves a rank: four parts in this order, little-endian, each filled with zeros to a multiple of 8 bytes
so that the next starts aligned. Every rank knows the layout of the bucket; what `wires.seal` puts in front tells a
packet of another bucket, and a damaged one.

| part   | bytes           | what                                                                              |
|--------|-----------------|-----------------------------------------------------------------------------------|
| levels | 2 * T           | bfloat16: the value of trit +1 in each rotation block                             |
| scales | 2 * S           | bfloat16: means of this rank's squared gradient over rows and columns, or nothing |
| exact  | itemsize * E    | the small parameters' gradient in the bucket's own dtype                          |
| trits  | T * P           | each rotation block begins a byte: five trits to a byte, base 3, P = ceil(K / 5); |
|        |                 | or with a sparsity of n > 1 block codes, `sparse.pack_codes`, P = K b / 8n        |

A block code has b = 1 + log2 n bits, place + n * (1 if negative), the first of eight in the lowest bits; which elements
it is of, `sparse.diagonals` says.

Shape letters: T rotation blocks of K trits in P bytes or L lanes, E exact elements, S scales.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vsa_ddp.cost import digits_per_lane

TRITS_PER_BYTE = 5
_ALIGN = 8


def pack_trits(trits_TK: Tensor) -> Tensor:
    """Pack trits {-1, 0, +1} into bytes, five to a byte. Exact: `unpack_trits` inverts it.

    Byte value = sum((trit[i] + 1) * 3**i for i in 0..4), 0..242. A short last byte is filled with trit 0.

    Shapes: (..., K) int8 -> (..., ceil(K / 5)) uint8, on the same device.
    Raises: TypeError if the dtype is not int8. Values outside {-1, 0, +1} are not checked (hot path).
    """
    if trits_TK.dtype != torch.int8:
        raise TypeError(f"trits must be int8, got {trits_TK.dtype}; convert them with .to(torch.int8).")
    fill = -trits_TK.shape[-1] % TRITS_PER_BYTE
    digits = torch.nn.functional.pad(trits_TK + 1, (0, fill), value=1).view(torch.uint8)
    digits = digits.view(*digits.shape[:-1], digits.shape[-1] // TRITS_PER_BYTE, TRITS_PER_BYTE)
    packed: Tensor = digits[..., 0].clone()
    for i in range(1, TRITS_PER_BYTE):
        packed.add_(digits[..., i], alpha=3**i)
    return packed


def unpack_trits(packed_TP: Tensor, num_trits: int) -> Tensor:
    """Invert `pack_trits`. Shapes: (..., ceil(K / 5)) uint8 -> (..., K) float32, which what follows calculates in.

    Raises: ValueError if the number of bytes is not that of `num_trits` trits.
    """
    num_bytes = -(-num_trits // TRITS_PER_BYTE)
    if packed_TP.shape[-1] != num_bytes:
        raise ValueError(f"{num_trits} trits take {num_bytes} bytes, got {packed_TP.shape[-1]}.")
    trits = trits_of_byte(packed_TP.device).index_select(0, packed_TP.flatten().int())
    return trits.view(*packed_TP.shape[:-1], num_bytes * TRITS_PER_BYTE)[..., :num_trits]


@cache
def trits_of_byte(device: torch.device) -> Tensor:
    """The table that unpacks a byte. Shapes: -> (256, 5) float32. Cached by device."""
    byte = torch.arange(256, device=device)[:, None]
    return (byte // 3 ** torch.arange(TRITS_PER_BYTE, device=device) % 3 - 1).float()


def pack_digits(trits_TK: Tensor, num_ranks: int) -> Tensor:
    """Trits as digits of int64 lanes that can be summed over `num_ranks` ranks without a carry. Exact.

    Lane j of a row = sum((trit[i * L + j] + 1) * (2W + 1)**i): a digit is 0..2 before the sum and 0..2W after it. The
    last digits are filled with trit 0.

    Shapes: (T, K) int8 -> (T, L) int64, L = ceil(K / digits_per_lane(W)).
    """
    num_rows, block = trits_TK.shape
    digits, base = digits_per_lane(num_ranks), 2 * num_ranks + 1
    lanes = -(-block // digits)
    columns = torch.nn.functional.pad(trits_TK + 1, (0, digits * lanes - block), value=1)
    packed = torch.zeros(num_rows, lanes, dtype=torch.int64, device=trits_TK.device)
    for column in reversed(torch.split(columns, lanes, 1)):
        packed.mul_(base).add_(column)
    return packed


def unpack_digits(packed_TL: Tensor, num_trits: int, num_ranks: int) -> Tensor:
    """The sums of trits from the sum of the ranks' lanes. Shapes: (T, L) int64 -> (T, K) float32 of -W..W."""
    base = 2 * num_ranks + 1
    sums = []
    for _ in range(digits_per_lane(num_ranks)):
        rest = packed_TL.div(base, rounding_mode="floor")
        sums.append((packed_TL - rest * base - num_ranks).float())
        packed_TL = rest
    return torch.cat(sums, 1)[:, :num_trits]


@dataclass(frozen=True)
class Packet:
    """What one rank has to say about one bucket: packed trits (T, P) uint8, levels (T,) and scales (S,) bfloat16, exact
    elements (E,) of any float; or several packets of one shape, with more dimensions in front.

    With a sigma that the ranks share, `levels_T` is (2T,): each row's energy, then what was kept of each.
    """

    packed_TP: Tensor
    levels_T: Tensor
    scales_S: Tensor
    exact_E: Tensor


def pack_packet(packet: Packet) -> Tensor:
    """The bytes of a packet. Exact: `unpack_packet` inverts it. Shapes: -> (..., bytes) uint8."""
    parts = []
    for part in (packet.levels_T, packet.scales_S, packet.exact_E, packet.packed_TP.flatten(-2)):
        data = part.view(torch.uint8)
        parts += [data, data.new_zeros(*data.shape[:-1], -data.shape[-1] % _ALIGN)]
    return torch.cat(parts, -1)


def packet_bytes(like: Packet) -> int:
    """How many bytes `pack_packet` makes of one packet of these shapes and dtypes."""
    sizes: list[int] = [part.nbytes for part in vars(like).values()]
    return sum(sizes) + sum(-size % _ALIGN for size in sizes)


def unpack_packet(data: Tensor, like: Packet) -> Packet:
    """Invert `pack_packet`, for one packet or several, without a copy. Shapes: (..., bytes) uint8 -> as in `Packet`.

    `like` is any packet of the same bucket and step: its last dimensions are read, nothing else.
    """

    def take(part: Tensor, num: int) -> Tensor:
        nonlocal data
        num_bytes = num * part.element_size()
        taken, data = data[..., :num_bytes], data[..., num_bytes + -num_bytes % _ALIGN :]
        return taken.view(part.dtype)

    levels_T, scales_S, exact_E = (take(part, part.shape[-1]) for part in (like.levels_T, like.scales_S, like.exact_E))
    rows = like.packed_TP.shape[-2:]
    packed = take(like.packed_TP, rows.numel())
    return Packet(packed.view(*packed.shape[:-1], *rows), levels_T, scales_S, exact_E)
