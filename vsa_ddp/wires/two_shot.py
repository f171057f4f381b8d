"""Each rank sums a shard. Shape letters: W ranks, T rotation blocks of K elements, t = T / W of them in a shard,
E exact elements, S scales, P bytes of a packet."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vsa_ddp.hypervector import bind, rotate, unbind, unpack_keys
from vsa_ddp.packing import Packet, pack_packet, trits_of_byte, unpack_packet
from vsa_ddp.ternary import add_dequantized_, dequantize, quantize
from vsa_ddp.wires.link import Link, keep_for_current_stream
from vsa_ddp.wires.message import Mean, Message, Rounds, summed_dtype
from vsa_ddp.wires.shards import joined, shards


@dataclass(frozen=True)
class TwoShot:
    """Packed shards to their owners, who sum them; what they found, ternarised again, to everyone.

    Received: 2 (W - 1) / W packets, whatever W. The mean of a few ternary rows is not Gaussian, so the owner binds it
    with fresh keys and rotates it again before the second rounding, which is unbiased like the first and adds 0.2348 of
    the mean's energy as noise. Small parameters and scales are summed in the same shards: no collective of their own.
    """

    num_rounds: ClassVar[int] = 2
    shared_sigma: ClassVar[bool] = False
    fresh_keys: ClassVar[bool] = True

    def exchange(self, message: Message, link: Link) -> Rounds:
        assert message.keys_D is not None
        w = link.world_size
        trits_TK, levels_T = quantize(message.y_TK)
        first = Packet(
            shards(trits_TK, w),
            shards(levels_T.bfloat16(), w),
            shards(message.scales_S.bfloat16(), w),
            shards(message.exact_E, w),
        )
        keys_tK = unpack_keys(shards(message.keys_D.view(-1, trits_TK.shape[1] // 8), w)[link.rank])
        trits_of_byte(message.y_TK.device)  # cached on this stream: the other's kernels may run before it is filled
        future, packets_WP = link.all_to_all(pack_packet(first))
        yield future

        keep_for_current_stream(packets_WP, keys_tK)
        arrived = unpack_packet(packets_WP, like=first)
        # In rank order, so that nothing depends on which rank owns the shard
        y_tK = torch.zeros_like(keys_tK)
        exact = torch.zeros_like(arrived.exact_E[0], dtype=summed_dtype(message.exact_E))
        scales = torch.zeros_like(arrived.scales_S[0], dtype=torch.float32)
        for rank in range(w):
            add_dequantized_(y_tK, arrived.trits_TK[rank], arrived.levels_T[rank])
            exact += arrived.exact_E[rank]
            scales += arrived.scales_S[rank]
        trits_tK, levels_t = quantize(rotate(bind(y_tK / w, keys_tK)))
        second = Packet(trits_tK, levels_t.bfloat16(), (scales / w).bfloat16(), (exact / w).to(message.exact_E.dtype))
        future, packets_WP = link.all_gather(pack_packet(second))
        yield future

        keep_for_current_stream(packets_WP, message.keys_D)
        arrived = unpack_packet(packets_WP, like=second)
        rows_TK = joined(arrived.trits_TK, message.y_TK.shape[0])
        y_TK = rotate(dequantize(rows_TK, joined(arrived.levels_T, rows_TK.shape[0])))
        return Mean(
            unbind(y_TK, unpack_keys(message.keys_D).view_as(y_TK)),
            joined(arrived.exact_E, message.exact_E.shape[0]),
            joined(arrived.scales_S, message.scales_S.shape[0]).float(),
        )
