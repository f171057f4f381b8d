"""Packed trits to everyone. Shape letters: W ranks, T rotation blocks of K elements, E exact elements, S scales."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vsa_ddp.kernels import Packed
from vsa_ddp.packing import Packet, pack_packet, unpack_packet
from vsa_ddp.ternary import level
from vsa_ddp.wires.all_reduce import shared_level
from vsa_ddp.wires.link import Link, keep_for_current_stream
from vsa_ddp.wires.message import Mean, Message, Rounds, summed_dtype


@dataclass(frozen=True)
class AllGather:
    """Every rank sends its packet of trits to all and decodes all of them: W - 1 packets received.

    Each rank quantises at its own sigma, or all at the shared one: then what is summed are integers, as in `AllReduce`,
    and the mean has its bits.
    """

    shared_sigma: bool = False
    num_rounds: ClassVar[int] = 1
    fresh_keys: ClassVar[bool] = False

    def exchange(self, message: Message, link: Link) -> Rounds:
        w, shape = link.world_size, message.rows.shape
        sigma_T = message.sigma_T if self.shared_sigma else None
        packed_TP, energy_T, kept_T = message.quantize(message.rows, sigma_T)
        levels = torch.cat([energy_T, kept_T]) if self.shared_sigma else level(energy_T, kept_T)
        mine = Packet(packed_TP, levels.bfloat16(), message.scales_S.bfloat16(), message.exact_E)
        future, packets = link.all_gather(pack_packet(mine))
        yield future

        keep_for_current_stream(packets)
        theirs = unpack_packet(packets, like=mine)
        # In rank order on every rank: the order of a float sum is part of its bits
        exact_E = torch.zeros_like(mine.exact_E, dtype=summed_dtype(mine.exact_E))
        scales_S = torch.zeros_like(mine.scales_S, dtype=torch.float32)
        for rank in range(w):
            exact_E += theirs.exact_E[rank]
            scales_S += theirs.scales_S[rank]
        exact_E, scales_S = (exact_E / w).to(mine.exact_E.dtype), scales_S / w
        if self.shared_sigma:
            levels_sum = torch.zeros_like(levels)
            for rank in range(w):
                levels_sum += theirs.levels_T[rank]
            levels_T, sigma_T = shared_level(levels_sum, w, shape[1])
            return Mean(Packed(theirs.packed_TP, levels_T, shape), exact_E, scales_S, sigma_T)
        return Mean(Packed(theirs.packed_TP, theirs.levels_T, shape, message.sparsity), exact_E, scales_S)
