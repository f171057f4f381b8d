"""Packed trits to everyone. Shape letters: W ranks, T rotation blocks of K elements, E exact elements, S scales."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vsa_ddp.packing import Packet, pack_packet, trits_of_byte, unpack_packet
from vsa_ddp.ternary import add_dequantized_, quantize, quantize_at
from vsa_ddp.wires.all_reduce import mean_of_trits
from vsa_ddp.wires.link import Link, keep_for_current_stream
from vsa_ddp.wires.message import Mean, Message, Rounds, summed_dtype


@dataclass(frozen=True)
class AllGather:
    """Every rank sends its packet of 1.6-bit trits to all and decodes all of them: W - 1 packets received.

    Each rank quantises at its own sigma, or all at the shared one: then what is summed are integers, as in `AllReduce`,
    and the mean has its bits.
    """

    shared_sigma: bool = False
    num_rounds: ClassVar[int] = 1
    fresh_keys: ClassVar[bool] = False

    def exchange(self, message: Message, link: Link) -> Rounds:
        if self.shared_sigma:
            assert message.sigma_T is not None
            trits_TK, energy_T, kept_T = quantize_at(message.y_TK, message.sigma_T)
            levels = torch.cat([energy_T, kept_T])
        else:
            trits_TK, levels = quantize(message.y_TK)
        mine = Packet(trits_TK, levels.bfloat16(), message.scales_S.bfloat16(), message.exact_E)
        trits_of_byte(message.y_TK.device)  # cached on this stream: the callbacks' streams do not wait for each other
        future, packets_WP = link.all_gather(pack_packet(mine))
        yield future

        keep_for_current_stream(packets_WP)
        # In rank order on every rank: the order of a float sum is part of its bits
        y_TK = torch.zeros_like(message.y_TK)
        levels_sum = torch.zeros_like(levels)
        exact_E = torch.zeros_like(message.exact_E, dtype=summed_dtype(message.exact_E))
        scales_S = torch.zeros_like(message.scales_S)
        for packet_P in packets_WP:
            theirs = unpack_packet(packet_P, like=mine)
            if self.shared_sigma:
                y_TK += theirs.trits_TK
            else:
                add_dequantized_(y_TK, theirs.trits_TK, theirs.levels_T)
            levels_sum += theirs.levels_T
            exact_E += theirs.exact_E
            scales_S += theirs.scales_S
        w = link.world_size
        exact_E, scales_S = (exact_E / w).to(message.exact_E.dtype), scales_S / w
        if self.shared_sigma:
            y_TK, sigma_T = mean_of_trits(y_TK, levels_sum, w)
            return Mean(y_TK, exact_E, scales_S, sigma_T)
        return Mean(y_TK / w, exact_E, scales_S)
