"""Do all ranks mean the same? Asked before the first gradient is sent, and with phases at every step."""

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DIGEST_BITS = 20
"""Squares of digests, summed over up to 8192 ranks, are exact in float64."""
_AT_ONCE = 2**22


def check_agreement(
    mine: dict[str, Any],
    group: dist.ProcessGroup,
    rule: str = "use the same settings for vsa_ddp",
    remedy: str = "Pass the same settings, model, seed and checkpoint on every rank.",
) -> None:
    """Compare `mine` with every other rank's. Blocks; collective over `group`.

    An entry that is a dict may be long: it is sent only if digests of it differ, and its first difference is named.
    Raises: ValueError on every rank, naming each entry that differs with its values by rank of the group.
    """
    long = {name: entry for name, entry in mine.items() if isinstance(entry, dict)}
    everyone = _gather({**mine, **{name: _crc(entry) for name, entry in long.items()}}, group)
    differences = []
    for name in _differing(everyone):
        values = [theirs.get(name) for theirs in everyone]
        if name in long:
            entries = _gather(long[name], group)
            first = _differing(entries)[0]
            name, values = f"{name} {first}", [theirs.get(first, "absent") for theirs in entries]
        listed = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
        differences.append(f"{name} ({listed})")
    if differences:
        raise ValueError(f"all ranks must {rule}, but they differ in {'; '.join(differences)}. {remedy}")


def _gather(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _differing(everyone: list[dict[str, Any]]) -> list[str]:
    """Names of entries that are not the same on all ranks, in the order of the first rank that has them."""
    names = {name: None for theirs in everyone for name in theirs}
    return [name for name in names if any(theirs.get(name) != everyone[0].get(name) for theirs in everyone)]


def _crc(value: object) -> int:
    return zlib.crc32(repr(value).encode())


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A number per tensor that depends on its bits and on nothing else: exact sums, in any order.

    Shapes: (T,) int64.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [_sum(t.detach().view(integers[t.element_size()])) for t in tensors]
    return torch.stack([s.to(sums[0].device) for s in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def _sum(integers: Tensor) -> Tensor:
    """In parts, since torch would copy all of them into the sum's dtype, of twice the size."""
    parts = [part.sum(dtype=torch.int64) for part in torch.split(integers.flatten(), _AT_ONCE)]
    return torch.stack(parts).sum()


def digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Of the bits of each tensor. The host waits for the device."""
    return {name: digest(fingerprint([t])) for name, t in named}


def digest(sums_T: Tensor) -> int:
    """Of `fingerprint`. The host waits for the device."""
    return zlib.crc32(sums_T.cpu().numpy().tobytes())


class StepAgreement:
    """One small all-reduce per step: sums numbers, and finds out whether entries that should be equal are.

    An entry travels as a digest d and its square: sums over W ranks with W sum(d^2) = sum(d)^2 mean that all are equal.
    Every rank sees the same sums, so all raise, or none. `group` is for these messages alone.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._same: dict[str, Any] = {}
        self._length = 0
        self._sent: deque[tuple[Tensor, dist.Work]] = deque()  # gloo writes into a message until its work is done

    @property
    def under_way(self) -> bool:
        """Whether a message was sent and not yet received."""
        return bool(self._sent)

    def send(self, same: dict[str, Any], numbers: Sequence[float]) -> None:
        """Begin to exchange; returns at once. Every rank calls it for each step, with as many entries and numbers."""
        digests = [_crc(value) % 2**_DIGEST_BITS for value in same.values()]
        self._same = same
        self._begin([0.0, *numbers, *digests, *(d * d for d in digests)])

    def fail(self) -> None:
        """Instead of the next message: say that this rank cannot go on. It receives nothing any more."""
        self._begin([1.0] + [0.0] * (self._length - 1))

    def receive(self) -> list[float]:
        """The numbers, summed over the ranks: the same bits on all. Waits for the ranks that have not sent theirs.

        Raises, on every rank: ValueError naming what differs; RuntimeError if a rank said that it failed, is gone, or
            has not sent its message within the group's timeout.
        """
        message, work = self._sent.popleft()
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                "a rank is gone or stuck: it did not say which step it is in. What happened is in its own log."
            ) from error
        failed, *values = message.tolist()
        size, count = self.group.size(), len(self._same)
        if failed:
            raise RuntimeError(f"{failed:.0f} of {size} ranks failed in the step before. Why is in their own logs.")
        numbers, sums, squares = values[: -2 * count], values[-2 * count : -count], values[-count:]
        if any(int(total) ** 2 != size * int(square) for total, square in zip(sums, squares, strict=True)):
            check_agreement(self._same, self.group)
            raise AssertionError("digests differ, and what they are digests of does not")
        return numbers

    def _begin(self, values: list[float]) -> None:
        self._length = len(values)
        message = torch.tensor(values, dtype=torch.float64)
        self._sent.append((message, dist.all_reduce(message, group=self.group, async_op=True)))
