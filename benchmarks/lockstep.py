"""Ranks in one process: the hook's own codec and wires, the bytes of the packets they would send, and no link.

Shape letters: W ranks, N elements of the gradient, P bytes of a packet.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.futures import Future

from vsa_ddp.alignment import Alignment
from vsa_ddp.codec import Codec
from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels import load_kernels
from vsa_ddp.layout import plan_bucket
from vsa_ddp.state import VsaState
from vsa_ddp.stats import ByteCounter
from vsa_ddp.wires import WIRES, Mean, Message, Wire
from vsa_ddp.wires.link import Link
from vsa_ddp.wires.seal import NOTHING, Inspection

CPU = torch.device("cpu")
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class LockstepLink(Link):
    """One rank's end of a link between ranks that take turns: what it handed over waits for the others' to arrive."""

    def __init__(self, rank: int, world_size: int, counter: ByteCounter) -> None:
        self.rank = rank
        self.world_size = world_size
        self._counter = counter
        self._is_local = False
        self._subject = NOTHING
        self._inspection = Inspection()
        self.handed: list[tuple[str, Tensor, Tensor]] = []
        """Collective, what was handed over, where to put what comes of it."""
        self._futures: list[Future[Any]] = []

    def _gather(self, packet_P: Tensor) -> tuple[Future[Any], Tensor]:
        out_WP = packet_P.new_empty(self.world_size, *packet_P.shape)
        self.handed.append(("all_gather", packet_P, out_WP))
        return self._future(), out_WP

    def _exchange(self, packets_WP: Tensor) -> tuple[Future[Any], Tensor]:
        out_WP = torch.empty_like(packets_WP)
        self.handed.append(("all_to_all", packets_WP, out_WP))
        return self._future(), out_WP

    def all_reduce_sum_(self, *tensors: Tensor) -> Future[Any]:
        for tensor in tensors:
            self._count(tensor.nbytes, 2 * tensor.nbytes * (self.world_size - 1) // self.world_size)
            self.handed.append(("all_reduce", tensor, tensor))
        return self._future()

    def _future(self) -> Future[Any]:
        self._futures.append(Future())
        return self._futures[-1]

    def finish(self) -> None:
        """All that was handed over has arrived. A future that never ends would keep its messages for good."""
        self.handed.clear()
        while self._futures:
            self._futures.pop().set_result(None)


def deliver(links: list[LockstepLink]) -> None:
    """Do the collectives that all ranks have begun."""
    for calls in zip(*(link.handed for link in links), strict=True):
        (kind,) = {kind for kind, _, _ in calls}
        handed = torch.stack([sent for _, sent, _ in calls])
        for rank, (_, _, out) in enumerate(calls):
            arrived = {"all_gather": handed, "all_to_all": handed[:, rank], "all_reduce": handed.sum(0)}[kind]
            out.copy_(arrived)
    for link in links:
        link.finish()


def exchange(wire: Wire, messages: list[Message], counter: ByteCounter) -> Mean:
    """The mean that every rank would get. The counter gets what rank 0 moves."""
    w = len(messages)
    links = [LockstepLink(rank, w, counter if rank == 0 else ByteCounter()) for rank in range(w)]
    rounds = [wire.exchange(message, link) for message, link in zip(messages, links, strict=True)]
    arrivals = [next(each) for each in rounds]
    while True:
        deliver(links)
        for arrival in arrivals:
            arrival.wait()
        try:
            arrivals = [next(rounds[0])]
        except StopIteration as finished:
            mean: Mean = finished.value
            return mean
        arrivals += [next(each) for each in rounds[1:]]


def shapes_of(model: nn.Module) -> Shapes:
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


class LockstepHook:
    """What `vsa_hook` does on W ranks that share one bucket; all of them would hold the same state."""

    def __init__(self, shapes: Shapes, config: VsaConfig) -> None:
        self._state = VsaState(config=config)
        layout = plan_bucket(shapes, config)
        self._codec = Codec(layout, config, self._state.whitening, CPU, load_kernels(config.backend, CPU))
        self._wire = WIRES[config.wire]
        self.counter = ByteCounter()
        self.step = 0

    @property
    def sent_bytes(self) -> float:
        """Handed over by one rank so far."""
        return self.counter.totals.wire_bytes

    @property
    def received_bytes(self) -> float:
        """By one rank so far, as its collectives work."""
        return self.counter.totals.received_bytes

    def average(self, gradient_WN: Tensor) -> Tensor:
        """The gradient that every rank would go on with. Overwrites what it is given. Shapes: (W, N) -> (N,)."""
        state, codec, step = self._state, self._codec, self.step
        self.step += 1
        scales = [state.measure_scales(codec, g_N, step) for g_N in gradient_WN]
        if state.sends_exact(step):
            w, handed = len(gradient_WN), gradient_WN[0].nbytes + scales[0].nbytes
            self.counter.add(wire_bytes=handed, received_bytes=2 * handed * (w - 1) // w)
            state.update_scales(codec, step, torch.stack(scales).mean(0))
            return gradient_WN.mean(0)
        keys = codec.keys(step)
        sigma_T = state.sigma.of(codec.layout, CPU) if self._wire.shared_sigma else None
        fresh = codec.fresh_keys(step) if self._wire.fresh_keys else None
        messages = [
            Message(codec.kernels, *codec.encode(g_N, keys), scales_S, sigma_T, fresh, state.config.sparsity)
            for g_N, scales_S in zip(gradient_WN, scales, strict=True)
        ]
        mean = exchange(self._wire, messages, self.counter)
        codec.decode_(gradient_WN[0], mean.rows, mean.exact_E, keys)
        state.update_scales(codec, step, mean.scales_S, mean.sigma_T)
        return gradient_WN[0]


class Averager(Protocol):
    """A method at work on W ranks in one process."""

    sent_bytes: float
    """Handed over by one rank so far."""
    received_bytes: float

    def average(self, gradient_WN: Tensor) -> Tensor:
        """The gradient that every rank goes on with. May overwrite what it is given. Shapes: (W, N) -> (N,)."""


class LockstepAverager:
    """What `VsaModelAverager` does with the changes of W ranks that share one bucket, by any way to average them."""

    def __init__(self, averager: Averager, shapes: Shapes, world_size: int, rescale: bool) -> None:
        self._averager = averager
        self._sizes = [math.prod(shape) for _, shape in shapes]
        self._alignments = [Alignment(self._sizes, world_size, CPU) for _ in range(world_size if rescale else 0)]

    @property
    def sent_bytes(self) -> float:
        """Handed over by one rank so far."""
        return self._averager.sent_bytes

    @property
    def received_bytes(self) -> float:
        return self._averager.received_bytes

    def average(self, change_WN: Tensor, num_steps: int) -> Tensor:
        """The change that every rank would make, after so many steps. Shapes: (W, N) -> (N,)."""
        sent_WN = change_WN.clone()
        for rank, alignment in enumerate(self._alignments):
            alignment.lengthen_(sent_WN[rank], num_steps)
        mean_N = self._averager.average(sent_WN)
        for rank, alignment in enumerate(self._alignments):
            alignment.observe(zip(change_WN[rank].split(self._sizes), mean_N.split(self._sizes), strict=True))
        return mean_N
