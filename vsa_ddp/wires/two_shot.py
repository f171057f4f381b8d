"""Each rank sums a shard. Shape letters: W ranks, T rotation blocks of K elements, t = T / W of them in a shard,
E exact elements, S scales, P bytes of a packet."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vsa_ddp.hypervector import bind, unbind, unpack_keys
from vsa_ddp.kernels import Packed
from vsa_ddp.packing import Packet, pack_packet, unpack_packet
from vsa_ddp.ternary import level
from vsa_ddp.wires.link import Link, keep_for_current_stream
from vsa_ddp.wires.message import Mean, Message, Rounds, summed_dtype
from vsa_ddp.wires.shards import joined, shards


@dataclass(frozen=True)
class TwoShot:
    """Packed shards to their owners, who sum them; what they found, ternarised again, to everyone.

    Received: 2 (W - 1) / W packets, whatever W. The mean of a few ternary rows is not Gaussian, so the owner binds it
    with fresh keys and rotates it again before the second rounding, which is unbiased like the first and adds its NMSE
    times the mean's energy as noise. Small parameters and scales are summed in the same shards: no collective of their
    own.
    """

    num_rounds: ClassVar[int] = 2
    shared_sigma: ClassVar[bool] = False
    fresh_keys: ClassVar[bool] = True

    def exchange(self, message: Message, link: Link) -> Rounds:
        assert message.keys_TC is not None
        w, kernels, (num_blocks, block) = link.world_size, message.kernels, message.rows.shape
        packed_TP, energy_T, kept_T = message.quantize(message.rows)
        first = Packet(
            shards(packed_TP, w),
            shards(level(energy_T, kept_T).bfloat16(), w),
            shards(message.scales_S.bfloat16(), w),
            shards(message.exact_E, w),
        )
        keys_tK = unpack_keys(shards(message.keys_TC, w)[link.rank])
        future, packets = link.all_to_all(pack_packet(first))
        yield future

        keep_for_current_stream(packets, keys_tK)
        arrived = unpack_packet(packets, like=first)
        # In rank order, so that nothing depends on which rank owns the shard
        exact = torch.zeros_like(arrived.exact_E[0], dtype=summed_dtype(message.exact_E))
        scales = torch.zeros_like(arrived.scales_S[0], dtype=torch.float32)
        for rank in range(w):
            exact += arrived.exact_E[rank]
            scales += arrived.scales_S[rank]
        y_tK = kernels.mean(Packed(arrived.packed_TP, arrived.levels_T, (len(keys_tK), block), message.sparsity))
        packed_tP, energy_t, kept_t = message.quantize(kernels.rotate(bind(y_tK, keys_tK)))
        second = Packet(
            packed_tP,
            level(energy_t, kept_t).bfloat16(),
            (scales / w).bfloat16(),
            (exact / w).to(message.exact_E.dtype),
        )
        future, packets = link.all_gather(pack_packet(second))
        yield future

        keep_for_current_stream(packets, message.keys_TC)
        arrived = unpack_packet(packets, like=second)
        rows_TP, levels_T = joined(arrived.packed_TP, num_blocks), joined(arrived.levels_T, num_blocks)
        y_TK = kernels.rotate(
            kernels.mean(Packed(rows_TP[None], levels_T[None], (num_blocks, block), message.sparsity))
        )
        return Mean(
            unbind(y_TK, unpack_keys(message.keys_TC)),
            joined(arrived.exact_E, message.exact_E.shape[0]),
            joined(arrived.scales_S, message.scales_S.shape[0]).float(),
        )
