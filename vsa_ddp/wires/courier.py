"""Who carries a wire's rounds: the hook's own thread the first, a callback or a thread of its own what follows.

On gloo a collective issued from a callback deadlocks or mixes up the ranks' data, and waiting inside the hook would
stop backward. So later rounds run in one thread, bucket after bucket, in process groups of their own: the same order on
all ranks. On NCCL waiting stops no host thread but a stream: there they are issued at once, on a side stream, in the
order in which every rank's backward issues them.
"""

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from vsa_ddp.stats import ByteCounter
from vsa_ddp.wires.hierarchical import Hierarchical
from vsa_ddp.wires.link import Link, carries_by_gloo, make_groups
from vsa_ddp.wires.message import Mean, Message, Rounds, Wire
from vsa_ddp.wires.seal import NOTHING, Inspection, Subject

logger = logging.getLogger(__name__)

_Job = Callable[[], None]


class Courier:
    """Carries the messages of one state by one wire.

    Making one is collective over `group` and blocks: wires of several rounds, and nodes, need process groups of their
    own. Args: `wire` None if every step is exact; `nodes` the members of the group by node, None if it is flat.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, wire: Wire | None, nodes: list[list[int]] | None = None
    ) -> None:
        self.group = group
        self.wire = Hierarchical(wire) if wire is not None and nodes is not None else wire
        self._groups = make_groups(group, self.wire.num_rounds if self.wire else 1, nodes)
        self._device = device
        on_cuda = device.type == "cuda"
        self._host_waits = not on_cuda or carries_by_gloo(group)
        if on_cuda and self._host_waits and torch.__version__ < "2.11":  # compared as versions
            logger.warning(
                "before torch 2.11 gloo may hand on CUDA tensors that have not arrived, with a hook and without one "
                "(pytorch issue 155714); use NCCL, or a newer torch"
            )
        self._jobs: queue.SimpleQueue[_Job | None] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._error: Exception | None = None
        self.inspection = Inspection()

    def link(self, counter: ByteCounter, subject: Subject = NOTHING) -> Link:
        """The link for one bucket.

        Raises: RuntimeError if a GPU has found out that an earlier message arrived damaged, and once an exchange has
            failed here: this rank's scales are not its peers' any more, or its next collective would meet their last.
        """
        self.inspection.raise_late()
        self._raise_failure()
        return self._groups.link(counter, subject, self.inspection)

    def carry(self, message: Message, link: Link) -> tuple[Future[Any], Callable[[], Mean]]:
        """Begin the exchange. Returns a future, and what gives the mean once the future is done; never waits."""
        assert self.wire is not None
        rounds = self.wire.exchange(message, link)
        first = next(rounds)
        if self.wire.num_rounds == 1:
            return first, lambda: _last_part(rounds)
        link.start_later_rounds()
        arrived: list[Mean] = []
        done: Future[Any] = Future(devices=[self._device] if self._device.type == "cuda" else [])

        def later_rounds() -> None:
            try:
                self._raise_failure()
                with torch.no_grad(), self._on_side_stream():
                    arrived.append(_all_parts(rounds, first))
                    done.set_result(_tensors(arrived[0]))
            except Exception as error:  # it belongs to who waits for the gradient
                self.fail(error)
                done.set_exception(error)

        if self._host_waits:
            self._queue().put(later_rounds)
        else:
            later_rounds()
        return done, arrived.pop

    def fail(self, error: Exception) -> None:
        """An exchange has failed on this rank: no further one begins."""
        self._error = self._error or error

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"an earlier exchange of gradients failed: {self._error}; start again.") from self._error

    def _queue(self) -> "queue.SimpleQueue[_Job | None]":
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            # A daemon: a process that was told to stop does not wait for a peer that is gone
            threading.Thread(target=_work, args=(self._jobs,), name="vsa_ddp later rounds", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        return self._jobs

    def _on_side_stream(self) -> torch.cuda.StreamContext:
        if self._device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)  # None, on CPU, changes nothing


def _work(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while job := jobs.get():
        job()
        del job  # or it would keep its courier alive while this waits for the next


def _last_part(rounds: Rounds) -> Mean:
    try:
        next(rounds)
    except StopIteration as finished:
        mean: Mean = finished.value
        return mean
    raise AssertionError("a wire of one round yielded twice")


def _all_parts(rounds: Rounds, pending: Future[Any]) -> Mean:
    while True:
        pending.wait()
        try:
            pending = next(rounds)
        except StopIteration as finished:
            mean: Mean = finished.value
            return mean


def _tensors(mean: Mean) -> list[Tensor]:
    parts = [mean, mean.rows] if not isinstance(mean.rows, Tensor) else [mean]
    return [tensor for part in parts for tensor in vars(part).values() if isinstance(tensor, Tensor)]
