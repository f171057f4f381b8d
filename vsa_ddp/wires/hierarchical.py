"""Full precision inside a node, any wire between nodes.

Shape letters: L ranks of a node, T rotation blocks of K elements, t = T / L of them in a shard, F floats of a shard.
"""

from dataclasses import dataclass

import torch

from vsa_ddp.kernels import encode
from vsa_ddp.wires.link import Link, keep_for_current_stream
from vsa_ddp.wires.message import Mean, Message, Rounds, Wire, summed_dtype
from vsa_ddp.wires.shards import joined, shards


@dataclass(frozen=True)
class Hierarchical:
    """Reduce-scatter in the node, the wire `between` nodes on each shard, all-gather in the node.

    A hypervector is linear in the gradient up to the quantiser, so what is summed in the node is the hypervector, B
    times smaller than the bucket, and the result is that of one rank per node with the node's mean gradient. The
    reduce-scatter is an all-to-all and a sum in rank order: the same bytes, the same bits in any run, and on gloo half
    the traffic of its own.
    """

    between: Wire

    @property
    def num_rounds(self) -> int:
        return 2 + self.between.num_rounds

    @property
    def shared_sigma(self) -> bool:
        return self.between.shared_sigma

    @property
    def fresh_keys(self) -> bool:
        return self.between.fresh_keys

    def exchange(self, message: Message, link: Link) -> Rounds:
        node, (num_blocks, block), kernels = link.node, message.rows.shape, message.kernels
        size = node.world_size
        summed = summed_dtype(message.exact_E)
        mine = [
            shards(encode(message.rows), size).flatten(1),
            shards(message.exact_E, size),
            shards(message.scales_S, size),
        ]
        sigma_t = None if message.sigma_T is None else shards(message.sigma_T, size)[node.rank]
        keys_tC = None if message.keys_TC is None else shards(message.keys_TC, size)[node.rank]
        future, theirs_LF = node.all_to_all(torch.cat([part.to(summed) for part in mine], 1))
        yield future

        keep_for_current_stream(theirs_LF, *(t for t in (sigma_t, keys_tC) if t is not None))
        mean_F = torch.zeros_like(theirs_LF[0])
        for floats_F in theirs_LF:
            mean_F += floats_F
        y, exact, scales = torch.split(mean_F / size, [part.shape[1] for part in mine])
        y_tK, exact_E = y.view(-1, block).float(), exact.to(message.exact_E.dtype)
        shard = Message(kernels, y_tK, exact_E, scales.float(), sigma_t, keys_tC, message.sparsity)
        mean = yield from self.between.exchange(shard, link.between)

        found = [kernels.mean(mean.rows).flatten(), mean.exact_E, mean.scales_S]
        if mean.sigma_T is not None:
            found.append(mean.sigma_T)
        future, all_LF = node.all_gather(torch.cat([part.to(summed) for part in found]))
        yield future

        keep_for_current_stream(all_LF)
        parts = torch.split(all_LF, [part.shape[0] for part in found], 1)
        return Mean(
            joined(parts[0].reshape(size, -1, block), num_blocks).float(),
            joined(parts[1], message.exact_E.shape[0]).to(message.exact_E.dtype),
            joined(parts[2], message.scales_S.shape[0]).float(),
            joined(parts[3], num_blocks).float() if mean.sigma_T is not None else None,
        )
