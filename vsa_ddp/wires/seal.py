"""Messages arrive as they were sent, and are about what the receiver thinks: sixteen bytes in front, and their check.

| word | bytes | what                                                                                                  |
|------|-------|-------------------------------------------------------------------------------------------------------|
| tag  | 8     | int64: CRC-32 of format version, step and bucket, which every rank knows: nobody reads another's mail |
| sum  | 8     | int64: checksum of all that follows, in words of 8 bytes                                              |

The checksum is linear: integers that the network sums have the sum of the ranks' checksums, and of their tags. It finds
every change of one word, any words that are lost or replaced but for one case in 2**60, and words that change places,
unless they are a multiple of 61 apart.

Shape letters: P words, C columns of the checksum.
"""

import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = 2
_HEADER_BYTES = 16
_COLUMNS = 61  # a prime: parts of a message that change places are no multiple of it apart


class Subject(NamedTuple):
    """What messages are about, equal on all ranks."""

    step: int = 0
    bucket: str = "no bucket"

    @property
    def tag(self) -> int:
        return zlib.crc32(repr((FORMAT, *self)).encode())

    def __str__(self) -> str:
        return f"step {self.step}, {self.bucket}"


NOTHING = Subject()
"""Of links that carry no gradients: the probe's."""


def checksum(words_P: Tensor) -> Tensor:
    """Sum over columns of odd weight times column sum, modulo 2**64. Shapes: (..., P) int64 -> (...)."""
    whole = words_P.shape[-1] // _COLUMNS * _COLUMNS
    sums_C = words_P[..., :whole].view(*words_P.shape[:-1], -1, _COLUMNS).sum(-2)
    sums_C[..., : words_P.shape[-1] - whole] += words_P[..., whole:]
    weights_C = torch.arange(_COLUMNS, device=words_P.device).mul_(0x1E3779B97F4A7C16).add_(1)  # odd, modulo 2**64
    return sums_C.mul_(weights_C).sum(-1)


def seal(message: Tensor, subject: Subject) -> Tensor:
    """Shapes: one message or several (..., any number) of any dtype -> (..., 2 + P) int64, filled with zeros."""
    *many, num = message.shape
    num_bytes = num * message.element_size()
    sealed = torch.zeros(*many, 2 + -(-num_bytes // 8), dtype=torch.int64, device=message.device)
    contents(sealed, message).copy_(message)
    sealed[..., 0] = subject.tag
    sealed[..., 1] = checksum(sealed[..., 2:])
    return sealed


def contents(sealed: Tensor, like: Tensor) -> Tensor:
    """Invert `seal`, without a copy and without a check. `like` is a message of that length and dtype."""
    num_bytes = like.shape[-1] * like.element_size()
    return sealed.view(torch.uint8)[..., _HEADER_BYTES : _HEADER_BYTES + num_bytes].view(like.dtype)


def verdict(sealed: Tensor, subject: Subject, num_summed: int = 1) -> Tensor:
    """Whether messages, or a sum of so many, are about the subject, and whether they are whole. Shapes: -> (2, ...)."""
    about, whole = sealed[..., 0] == subject.tag * num_summed, sealed[..., 1] == checksum(sealed[..., 2:])
    return torch.stack([about, whole])


class Inspection:
    """Raises where a verdict is bad: at once on a CPU; on a GPU, where reading it would stop the host, at a later step.

    Until then the gradient is what arrived: the step at which it raises is past the one that was damaged.
    """

    def __init__(self) -> None:
        self._late: deque[tuple[torch.cuda.Event, Tensor, Callable[[Tensor], str]]] = deque()

    def expect(self, good: Tensor, complaint: Callable[[Tensor], str]) -> None:
        """Raises: RuntimeError of the complaint about `good`, on the CPU, if not all of it is true."""
        if not good.is_cuda:
            if not good.all():
                raise RuntimeError(complaint(good))
            return
        copied = torch.empty(good.shape, dtype=good.dtype, pin_memory=True)
        copied.copy_(good, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(good.device))  # gloo's threads are on another device
        self._late.append((event, copied, complaint))

    def raise_late(self) -> None:
        """Raises: RuntimeError for what a GPU has found out meanwhile."""
        while self._late and self._late[0][0].query():  # type: ignore[no-untyped-call]
            _, good, complaint = self._late.popleft()
            self.expect(good, complaint)


def complaint_about(good: Tensor, subject: Subject) -> str:
    """What is wrong with messages, by their `verdict`. Shapes: (2, W), or (2,) for a sum."""
    about, whole = good.reshape(2, -1)
    bad = (~about if whole.all() else ~whole).nonzero().flatten().tolist()
    whose = f"rank {', '.join(map(str, bad))}" if good.dim() > 1 else "all ranks, summed"
    if whole.all():
        return (
            f"the message of {whose} is about another bucket or step than {subject}: the ranks are out of step. Every "
            "rank must call backward as often, for the same models in the same order; go on from the last checkpoint."
        )
    return (
        f"the message of {whose} arrived damaged, in {subject}: its checksum does not match. Go on from the last "
        "checkpoint; if it happens again, look at that machine's network and memory."
    )


def inspected(sealed: Tensor, subject: Subject, inspection: Inspection, num_summed: int = 1) -> Callable[[Any], Any]:
    """What a future calls when messages have arrived: looks at them, and passes its value on."""

    @torch.no_grad()
    def look(done: Any) -> Any:
        value = done.value()
        good = verdict(sealed, subject, num_summed)
        inspection.expect(good, lambda good: complaint_about(good, subject))
        return value

    return look
