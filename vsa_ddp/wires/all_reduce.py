"""Trits that the network sums. Shape letters: W ranks, T rotation blocks of K elements, E exact elements, S scales."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vsa_ddp.kernels import Summed
from vsa_ddp.ternary import level
from vsa_ddp.wires.link import Link, keep_for_current_stream
from vsa_ddp.wires.message import Mean, Message, Rounds


@dataclass(frozen=True)
class AllReduce:
    """Trits as digits of int64 lanes, all at the shared sigma, summed on the way. Bytes do not grow with W, digits do.

    The sum is exact, whatever the order of the ranks. Energies, scales and small parameters travel beside the lanes at
    the same time, in a second all-reduce. It is of float64: the network sums in an order that depends on an element's
    place in the bucket, and in float32 other buckets would round otherwise.
    """

    num_rounds: ClassVar[int] = 1
    shared_sigma: ClassVar[bool] = True
    fresh_keys: ClassVar[bool] = False

    def exchange(self, message: Message, link: Link) -> Rounds:
        assert message.sigma_T is not None
        w = link.world_size
        lanes, energy_T, kept_T = message.kernels.quantize_to_digits(message.rows, message.sigma_T, w)
        # bfloat16's 8 bits: sums of them are exact in any order, and the same as AllGather's
        levels = torch.cat([energy_T, kept_T]).bfloat16()
        sides = torch.cat([part.double() for part in (levels, message.scales_S.bfloat16(), message.exact_E)])
        future, lanes = link.all_reduce_sum(lanes, sides)
        yield future

        keep_for_current_stream(lanes, sides)
        first, second = levels.numel(), levels.numel() + message.scales_S.numel()
        levels_sum, scales_S, exact_E = sides.tensor_split([first, second])
        levels_T, sigma_T = shared_level(levels_sum.float(), w, message.rows.shape[1])
        mean = Summed(lanes, levels_T, w, message.rows.shape)
        return Mean(mean, (exact_E / w).to(message.exact_E.dtype), scales_S.float() / w, sigma_T)


def shared_level(levels_sum: Tensor, world_size: int, block: int) -> tuple[Tensor, Tensor]:
    """The level of trits summed at a shared sigma, and the ranks' own standard deviation.

    Shapes: (2T,) float32 energies and what was kept, summed over ranks -> (T,), (T,) float32.
    """
    energy_T, kept_T = levels_sum.chunk(2)
    return level(energy_T, kept_T), (energy_T / (world_size * block)).sqrt()
