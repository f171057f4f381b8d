"""What a rank changed since the last average, in buckets such as DDP would show a hook.

Shape letters: N elements of a bucket, P parameters in it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vsa_ddp.alignment import Alignment

_BUCKET_BYTES = 25 * 2**20


class ChangeBucket:
    """Changes of some parameters."""

    def __init__(self, index: int, is_last: bool, common: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        self._index = index
        self._is_last = is_last
        self._common = common
        self._parameters = parameters
        self._change_N = torch.empty(0)
        self._alignment: Alignment | None = None

    def align(self, world_size: int) -> None:
        """Lengthen changes from now on, as `Alignment` says."""
        sizes = [p.numel() for p in self._parameters.values()]
        self._alignment = Alignment(sizes, world_size, next(iter(self._parameters.values())).device)

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._is_last

    def buffer(self) -> Tensor:
        return self._change_N

    def parameters(self) -> list[Tensor]:
        return list(self._common.values())

    def begin(self, num_steps: int, own_share: float) -> None:
        """Put what this rank changed, in so many steps, where the hook takes it from, lengthened if it is to be."""
        first = next(iter(self._parameters.values()))
        self._change_N = first.new_empty(sum(p.numel() for p in self._parameters.values()))
        for common, p, change in self._parts():
            torch.sub(common, p, out=change)
        if self._alignment:
            self._alignment.lengthen_(self._change_N, num_steps, own_share)

    def finish(self) -> None:
        """Go on from where the ranks' mean change leads to."""
        if self._alignment:
            self._alignment.observe((common - p, mean) for common, p, mean in self._parts())
        for common, p, mean in self._parts():
            p.copy_(common.sub_(mean))
        self._change_N = torch.empty(0)

    def alignment(self) -> dict[str, Tensor]:
        """Each parameter's moments, by name; none where changes are not lengthened. Shape: (2,)."""
        return dict(zip(self._common, self._alignment.moments_2P.T, strict=True)) if self._alignment else {}

    def load_alignment(self, saved: dict[str, Tensor]) -> None:
        for name, moments in self.alignment().items():
            if name in saved:
                moments.copy_(saved[name])

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each parameter: where all ranks were last, where this one is, and its part of the buffer."""
        parts = torch.split(self._change_N, [p.numel() for p in self._parameters.values()])
        for (name, common), part_N in zip(self._common.items(), parts, strict=True):
            yield common, self._parameters[name], part_N.view_as(common)


def fill_buckets(common: dict[str, Tensor], parameters: dict[str, Tensor]) -> list[ChangeBucket]:
    """Up to 25 MiB each, of one dtype, in the model's order."""
    groups: list[list[str]] = []
    for dtype in dict.fromkeys(p.dtype for p in parameters.values()):
        room = 0
        for name, p in parameters.items():
            if p.dtype != dtype:
                continue
            if room < p.nbytes or not room:
                groups.append([])
                room = _BUCKET_BYTES
            groups[-1].append(name)
            room -= p.nbytes
    last = len(groups) - 1
    return [
        ChangeBucket(i, i == last, {n: common[n] for n in names}, {n: parameters[n] for n in names})
        for i, names in enumerate(groups)
    ]
