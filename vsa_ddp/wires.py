"""Stage 7: how messages cross the ranks. The only room, with `agreement`, that calls a collective.

Collectives are issued inside the hook call, in bucket order, the same on all ranks; a callback only computes. (On gloo,
a collective issued from a callback deadlocks or mixes up the ranks' data.)

A new wire is a class with `exchange` and a line in `WIRES` and `config.WireName`; the tests take it from there.

Shape letters: W ranks, T rotation blocks of K elements, E exact elements, S scales, P bytes of a packet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from vsa_ddp.packing import Packet, pack_digits, pack_packet, trits_of_byte, unpack_digits, unpack_packet
from vsa_ddp.stats import ByteCounter
from vsa_ddp.ternary import dequantize, level, quantize, quantize_at

# torch 2.13 renamed it and warns about the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Link:
    """The collectives of one process group, asynchronous, with every byte counted as it is handed over."""

    def __init__(self, group: dist.ProcessGroup, counter: ByteCounter) -> None:
        self._group = group
        self._counter = counter
        self.world_size = group.size()

    def all_reduce_mean_(self, *tensors: Tensor) -> Future[Any]:
        """Mean of each tensor over the ranks, in place; empty ones are not sent.

        Divided before the sum, as DDP does: half precision holds it, and the bits are DDP's own.
        """
        for tensor in tensors:
            tensor.mul_(1.0 / self.world_size)
        return self.all_reduce_sum_(*tensors)

    def all_reduce_sum_(self, *tensors: Tensor) -> Future[Any]:
        """Sum of each tensor over the ranks, in place; empty ones are not sent. All are under way at once."""
        futures = []
        for tensor in tensors:
            if tensor.numel():
                self._counter.wire_bytes += tensor.nbytes
                futures.append(_future(dist.all_reduce(tensor, group=self._group, async_op=True)))
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

    def all_gather(self, packet_P: Tensor) -> tuple[Future[Any], Tensor]:
        """Every rank's packet. Shapes: (P,) -> a future, and (W, P), valid once the future is done."""
        self._counter.wire_bytes += packet_P.nbytes
        packets = packet_P.new_empty(self.world_size * packet_P.shape[0])
        future = _future(_all_gather(packets, packet_P, group=self._group, async_op=True))
        return future, packets.view(self.world_size, -1)


def _future(work: Any) -> Future[Any]:
    future: Future[Any] = work.get_future()
    return future


def keep_for_current_stream(*tensors: Tensor) -> None:
    """Tell CUDA's allocator that the current stream, a callback's own, still reads what another stream allocated."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@dataclass(frozen=True)
class Message:
    """What one rank wants averaged. Shapes: (T, K) float32, (T,) float32, (E,) the bucket's dtype, (S,) float32."""

    y_TK: Tensor
    """The rotated hypervector."""
    sigma_T: Tensor | None
    """Standard deviation of its rows as all ranks know it, zero where they do not yet; None if the wire shares none."""
    exact_E: Tensor
    scales_S: Tensor


@dataclass(frozen=True)
class Mean:
    """The ranks' mean of a message, the same bits on all. Shapes and dtypes as in `Message`."""

    y_TK: Tensor
    sigma_T: Tensor | None
    """Standard deviation of this step's rows over all ranks; None if the wire lets each rank use its own."""
    exact_E: Tensor
    scales_S: Tensor


class Wire(Protocol):
    """How the ranks' messages about one bucket become their mean."""

    @property
    def shared_sigma(self) -> bool:
        """Whether all ranks quantise at the same sigma, so that a message must bring it."""

    def exchange(self, message: Message, link: Link) -> tuple[Future[Any], Callable[[], Mean]]:
        """Issue the collectives. Returns a future, and what computes the mean once the future is done."""


@dataclass(frozen=True)
class AllGather:
    """Every rank sends its packet of 1.6-bit trits to all and decodes all of them: W - 1 packets received.

    Each rank quantises at its own sigma, or all at the shared one: then what is summed are integers, as in `AllReduce`,
    and the mean has its bits.
    """

    shared_sigma: bool = False

    def exchange(self, message: Message, link: Link) -> tuple[Future[Any], Callable[[], Mean]]:
        if self.shared_sigma:
            assert message.sigma_T is not None
            trits_TK, energy_T, kept_T = quantize_at(message.y_TK, message.sigma_T)
            levels = torch.cat([energy_T, kept_T])
        else:
            trits_TK, levels = quantize(message.y_TK)
        mine = Packet(trits_TK, levels.bfloat16(), message.scales_S.bfloat16(), message.exact_E)
        trits_of_byte(message.y_TK.device)  # cached on this stream: the callbacks' streams do not wait for each other
        future, packets_WP = link.all_gather(pack_packet(mine))

        def mean() -> Mean:
            keep_for_current_stream(packets_WP)
            # In rank order on every rank: the order of a float sum is part of its bits
            y_TK = torch.zeros_like(message.y_TK)
            levels_sum = torch.zeros_like(levels)
            exact_E = torch.zeros_like(message.exact_E, dtype=_summed_dtype(message.exact_E))
            scales_S = torch.zeros_like(message.scales_S)
            for packet_P in packets_WP:
                theirs = unpack_packet(packet_P, like=mine)
                y_TK += theirs.trits_TK if self.shared_sigma else dequantize(theirs.trits_TK, theirs.levels_T)
                levels_sum += theirs.levels_T
                exact_E += theirs.exact_E
                scales_S += theirs.scales_S
            return _mean(message, link, y_TK, levels_sum if self.shared_sigma else None, exact_E, scales_S)

        return future, mean


@dataclass(frozen=True)
class AllReduce:
    """The network sums: trits as digits of int64 lanes, all at the shared sigma. Bytes do not grow with W, digits do.

    The sum is exact, whatever the order of the ranks. Energies, scales and small parameters travel beside the lanes at
    the same time, in a second all-reduce of floats.
    """

    shared_sigma: ClassVar[bool] = True

    def exchange(self, message: Message, link: Link) -> tuple[Future[Any], Callable[[], Mean]]:
        assert message.sigma_T is not None
        trits_TK, energy_T, kept_T = quantize_at(message.y_TK, message.sigma_T)
        # bfloat16's 8 bits: float32 sums of them are exact in any order, and the same as AllGather's
        levels = torch.cat([energy_T, kept_T]).bfloat16()
        summed = _summed_dtype(message.exact_E)
        lanes = pack_digits(trits_TK.flatten(), link.world_size)
        sides = torch.cat([levels.to(summed), message.scales_S.bfloat16().to(summed), message.exact_E.to(summed)])
        future = link.all_reduce_sum_(lanes, sides)

        def mean() -> Mean:
            keep_for_current_stream(lanes, sides)
            sums_TK = unpack_digits(lanes, trits_TK.numel(), link.world_size).view_as(message.y_TK)
            first, second = levels.numel(), levels.numel() + message.scales_S.numel()
            levels_sum, scales_S, exact_E = sides.tensor_split([first, second])
            return _mean(message, link, sums_TK, levels_sum.float(), exact_E, scales_S.float())

        return future, mean


def _summed_dtype(exact_E: Tensor) -> torch.dtype:
    return torch.promote_types(exact_E.dtype, torch.float32)


def _mean(
    message: Message, link: Link, y_TK: Tensor, levels_sum: Tensor | None, exact_E: Tensor, scales_S: Tensor
) -> Mean:
    """From sums over the ranks to their mean. With `levels_sum`, y_TK is the sum of trits at the shared sigma."""
    sigma_T = None
    if levels_sum is not None:
        energy_T, kept_T = levels_sum.chunk(2)
        y_TK = dequantize(y_TK, level(energy_T, kept_T))
        sigma_T = (energy_T / (link.world_size * y_TK.shape[1])).sqrt()
    w = link.world_size
    return Mean(y_TK / w, sigma_T, (exact_E / w).to(message.exact_E.dtype), scales_S / w)


WIRES: dict[str, Wire] = {"all_gather": AllGather(), "all_reduce": AllReduce()}
"""The wires that carry compressed messages. `wire="dense"` needs none: every step is an exact one."""
