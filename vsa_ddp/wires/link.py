"""The collectives of a process group, asynchronous, counted as they are handed over, and the groups they run in.

What a collective of n bytes handed over by each of W ranks puts on this rank's network, each way:

| collective  | bytes sent, and received | algorithm                                       |
|-------------|--------------------------|-------------------------------------------------|
| all-reduce  | 2 (W - 1) / W * n        | ring: reduce-scatter, then all-gather           |
| all-gather  | (W - 1) * n              | ring: each packet passes every rank             |
| all-to-all  | (W - 1) / W * n          | pairwise                                        |

gloo does it so: `benchmarks/bench_wire.py` compares with the counters of the network interface. NCCL may choose trees.

Shape letters: W ranks, P bytes of a packet.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from vsa_ddp.stats import ByteCounter
from vsa_ddp.wires.seal import NOTHING, Inspection, Subject, contents, inspected, seal

# torch 2.13 renamed it and warns about the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

CHUNK_BYTES = 256 * 1024
"""gloo passes longer messages between two ranks in one direction at a time, and a slow link would idle half of it."""


class Link:
    """The ranks of one group, as one bucket sees them.

    What leaves the node is sealed (see `seal`): a message that was damaged, or is about another bucket or step, raises.
    A wire's first round runs in the thread of backward, its later ones in another (see `Courier`): both are in bucket
    order, but each needs a process group of its own, or ranks would pair up different collectives.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        counter: ByteCounter,
        *,
        later_group: dist.ProcessGroup | None = None,
        node: "Link | None" = None,
        between: "Link | None" = None,
        is_local: bool = False,
        subject: Subject = NOTHING,
        inspection: Inspection | None = None,
    ) -> None:
        self._group = group
        self._later_group = later_group
        self._counter = counter
        self._is_local = is_local
        self._subject = subject
        self._inspection = inspection if inspection is not None else Inspection()
        self._node = node
        self._between = between
        self.rank = group.rank()
        self.world_size = group.size()

    @property
    def node(self) -> "Link":
        """The ranks of this node. Only with `ranks_per_node`."""
        assert self._node is not None
        return self._node

    @property
    def between(self) -> "Link":
        """The ranks of the other nodes that hold the same shard as this one. Only with `ranks_per_node`."""
        assert self._between is not None
        return self._between

    def start_later_rounds(self) -> None:
        """From now on use the process groups of the other thread."""
        if self._later_group is not None:
            self._group = self._later_group
        for link in (self._node, self._between):
            if link is not None:
                link.start_later_rounds()

    def all_reduce_mean_(self, *tensors: Tensor) -> Future[Any]:
        """Mean of each tensor over the ranks, in place; empty ones are not sent.

        Divided before the sum, as DDP does: half precision holds it, and the bits are DDP's own.
        """
        for tensor in tensors:
            tensor.mul_(1.0 / self.world_size)
        return self.all_reduce_sum_(*tensors)

    def all_reduce_sum_(self, *tensors: Tensor) -> Future[Any]:
        """Sum of each tensor over the ranks, in place; empty ones are not sent. All are under way at once."""
        works = []
        for tensor in tensors:
            if tensor.numel():
                self._count(tensor.nbytes, 2 * tensor.nbytes * (self.world_size - 1) // self.world_size)
                works.append(dist.all_reduce(tensor, group=self._group, async_op=True))
        return _when_all_done(works)

    def all_reduce_sum(self, lanes: Tensor, floats: Tensor) -> tuple[Future[Any], Tensor]:
        """Sum over the ranks of int64 `lanes`, exact, and beside them of floats, in place.

        Shapes: any, any -> a future, and the lanes' sum, valid once the future is done.
        """
        sealed = seal(lanes.flatten(), self._subject)
        future = self.all_reduce_sum_(sealed, floats)
        look = inspected(sealed, self._subject, self._inspection, self.world_size)
        return future.then(look), contents(sealed, lanes.flatten()).view(lanes.shape)

    def all_gather(self, packet_P: Tensor) -> tuple[Future[Any], Tensor]:
        """Every rank's packet. Shapes: (P,) -> a future, and (W, P), valid once the future is done."""
        sealed = packet_P if self._is_local else seal(packet_P, self._subject)
        self._count(sealed.nbytes, sealed.nbytes * (self.world_size - 1))
        return self._opened(*self._gather(sealed), packet_P)

    def all_to_all(self, packets_WP: Tensor) -> tuple[Future[Any], Tensor]:
        """Row w to rank w. Shapes: (W, P) -> a future, and (W, P), row w from rank w, valid once the future is done."""
        sealed = packets_WP if self._is_local else seal(packets_WP, self._subject)
        self._count(sealed.nbytes, sealed.nbytes * (self.world_size - 1) // self.world_size)
        return self._opened(*self._exchange(sealed), packets_WP)

    def _opened(self, future: Future[Any], arrived: Tensor, like: Tensor) -> tuple[Future[Any], Tensor]:
        if self._is_local:
            return future, arrived
        return future.then(inspected(arrived, self._subject, self._inspection)), contents(arrived, like)

    def _gather(self, packet_P: Tensor) -> tuple[Future[Any], Tensor]:
        packets_WP = packet_P.new_empty(self.world_size, packet_P.shape[0])
        if packet_P.is_cuda or packet_P.nbytes <= CHUNK_BYTES:
            works = [_all_gather(packets_WP.view(-1), packet_P, group=self._group, async_op=True)]
        else:
            works = [
                dist.all_gather(list(packets_WP[:, part]), packet_P[part], group=self._group, async_op=True)
                for part in _chunks(packet_P)
            ]
        return _when_all_done(works), packets_WP

    def _exchange(self, packets_WP: Tensor) -> tuple[Future[Any], Tensor]:
        received_WP = torch.empty_like(packets_WP)
        if packets_WP.is_cuda or packets_WP[0].nbytes <= CHUNK_BYTES:
            work = dist.all_to_all_single(received_WP, packets_WP, group=self._group, async_op=True)
            return _when_all_done([work]), received_WP
        sent = [(part, packets_WP[:, part].contiguous()) for part in _chunks(packets_WP[0])]
        arrived = [torch.empty_like(rows) for _, rows in sent]
        works = [
            dist.all_to_all_single(out, rows, group=self._group, async_op=True)
            for out, (_, rows) in zip(arrived, sent, strict=True)
        ]

        def assemble(done: Future[Any]) -> Any:
            for (part, _), rows in zip(sent, arrived, strict=True):
                received_WP[:, part] = rows
            return done.value()

        return _when_all_done(works).then(assemble), received_WP

    def _count(self, handed: int, moved: int) -> None:
        if self._is_local:
            self._counter.add(local_bytes=handed)
        else:
            self._counter.add(wire_bytes=handed, sent_bytes=moved, received_bytes=moved)


def _chunks(packet_P: Tensor) -> Iterator[slice]:
    step = CHUNK_BYTES // packet_P.element_size()
    for start in range(0, packet_P.shape[0], step):
        yield slice(start, start + step)


def _when_all_done(works: list[Any]) -> Future[Any]:
    futures: list[Future[Any]] = [work.get_future() for work in works]
    if not futures:
        done: Future[Any] = Future()
        done.set_result([])
        return done
    *earlier, last = futures
    if not earlier:
        return last

    def all_done(last: Future[Any]) -> Any:
        # Begun before `last`, so under way or done: on gloo this waits for the other thread, on NCCL for the stream
        for future in earlier:
            future.wait()
        return last.value()

    return last.then(all_done)


@dataclass(frozen=True)
class Groups:
    """The process groups of one state: the user's own, and those that later rounds and nodes need."""

    whole: dist.ProcessGroup
    later: dist.ProcessGroup | None = None
    node: dist.ProcessGroup | None = None
    node_later: dist.ProcessGroup | None = None
    between: dist.ProcessGroup | None = None

    def link(self, counter: ByteCounter, subject: Subject, inspection: Inspection) -> Link:
        """The link of one bucket."""
        node = between = None
        if self.node is not None and self.between is not None:
            node = Link(self.node, counter, later_group=self.node_later, is_local=True)
            between = Link(self.between, counter, subject=subject, inspection=inspection)
        return Link(
            self.whole,
            counter,
            later_group=self.later,
            node=node,
            between=between,
            subject=subject,
            inspection=inspection,
        )


def make_groups(whole: dist.ProcessGroup, num_rounds: int, nodes: list[list[int]] | None) -> Groups:
    """Make the process groups that a wire of so many rounds needs, with the backend and timeout of `whole`.

    Collective over `whole`, blocks. `nodes` are ranks of `whole` by node, all of them equally many; None is flat.
    Raises: ValueError if NCCL could not make them.
    """
    if num_rounds == 1:
        return Groups(whole)
    _check_can_split(whole)
    ranks = dist.get_process_group_ranks(whole)
    if nodes is None:
        return Groups(whole, later=_make(whole, [ranks]))
    # a group orders its members by rank, so a shard's number is its owner's place among the sorted ranks of the node
    by_node = [sorted(ranks[member] for member in node) for node in nodes]
    peers = [list(members) for members in zip(*by_node, strict=True)]
    return Groups(whole, node=_make(whole, by_node), node_later=_make(whole, by_node), between=_make(whole, peers))


def carries_by_gloo(group: dist.ProcessGroup) -> bool:
    """Whether tensors on GPUs go by gloo, alone or beside another backend for the CPU's."""
    backend: str = dist.get_backend(group)
    return backend == "gloo" or "cuda:gloo" in backend


def num_groups_made() -> int:
    """How many process groups this rank has made: ranks that differ in it cannot make one for themselves alone."""
    return len(dist.distributed_c10d._world.pg_names)


def _check_can_split(whole: dist.ProcessGroup) -> None:
    """Raises: ValueError if making groups of some ranks would need those of all others too."""
    if whole is not dist.group.WORLD and getattr(dist.group.WORLD, "bound_device_id", None) is not None:
        raise ValueError(
            "wires of several rounds, and nodes, need process groups of their own, which NCCL makes by splitting the "
            "default group when init_process_group had a device_id; leave device_id out, let DDP use the default "
            'group, or use wire="all_gather" or "all_reduce".'
        )


def make_cpu_twin(whole: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks, with the timeout of `whole`. Collective over `whole`, blocks."""
    return _make(whole, [dist.get_process_group_ranks(whole)], "gloo")


def _make(whole: dist.ProcessGroup, groups: list[list[int]], backend: str | None = None) -> dist.ProcessGroup:
    """Make these groups of `whole`'s ranks. Returns the one that this rank is in."""
    backend = backend or dist.get_backend(whole)
    new_group = functools.partial(dist.new_group, timeout=_timeout(whole), backend=backend)
    mine = next(index for index, ranks in enumerate(groups) if dist.get_rank() in ranks)
    made: dist.ProcessGroup
    if whole is dist.group.WORLD:  # every rank makes all of them, in the same order
        made = [new_group(ranks) for ranks in groups][mine]
    else:
        made = new_group(groups[mine], use_local_synchronization=True)
    return made


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long a group waits for a peer; None, torch's default, if it does not say."""
    for device in group._device_types:
        try:
            timeout: timedelta = group._get_backend(device).options._timeout
        except (AttributeError, RuntimeError):  # a backend of somebody's own
            continue
        return timeout
    return None


def keep_for_current_stream(*tensors: Tensor) -> None:
    """Tell CUDA's allocator that the current stream, a callback's own, still reads what another stream allocated."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
