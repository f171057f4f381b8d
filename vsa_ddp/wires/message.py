"""What travels, and what a wire is.

Shape letters: T rotation blocks of K elements (D = T * K), E exact elements, S scales.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.futures import Future

from vsa_ddp.kernels import Kernels, Received, Rows
from vsa_ddp.wires.link import Link


@dataclass(frozen=True)
class Message:
    """What one rank wants averaged."""

    kernels: Kernels
    """What calculates."""
    rows: Rows
    """The rotated hypervector, (T, K); encoded when the wire asks for it."""
    exact_E: Tensor
    """Small parameters, in the bucket's dtype."""
    scales_S: Tensor
    """Scales measured in this step, float32, or none."""
    sigma_T: Tensor | None = None
    """Standard deviation of the rows as all ranks know it, zero where they do not yet, if the wire asks for it."""
    keys_TC: Tensor | None = None
    """Words of fresh keys, the same on all ranks, if the wire rounds a second time. (T, K / 32) int32."""
    sparsity: int = 1
    """How many elements of a row share a trit."""

    def quantize(self, rows: Rows, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`Kernels.quantize`, or `quantize_sparsely` where elements share trits."""
        if self.sparsity > 1:
            return self.kernels.quantize_sparsely(rows, self.sparsity)
        return self.kernels.quantize(rows, sigma_T)


@dataclass(frozen=True)
class Mean:
    """The ranks' mean of a message, the same bits on all. Shapes and dtypes as in `Message`."""

    rows: Received
    exact_E: Tensor
    scales_S: Tensor
    sigma_T: Tensor | None = None
    """Standard deviation of this step's rows over all ranks; None if the wire lets each rank use its own."""


Rounds = Generator[Future[Any], None, Mean]
"""A wire at work: it yields what it waits for, and returns the mean."""


class Wire(Protocol):
    """How the ranks' messages about one bucket become their mean."""

    @property
    def num_rounds(self) -> int:
        """How often `exchange` yields. With more than one, the later ones run in a thread of their own."""

    @property
    def shared_sigma(self) -> bool:
        """Whether all ranks quantise at the same sigma, so that a message must bring it."""

    @property
    def fresh_keys(self) -> bool:
        """Whether the wire rounds a second time, so that a message must bring keys for it."""

    def exchange(self, message: Message, link: Link) -> Rounds:
        """Issue collectives, yield the future to wait for, go on with what has arrived; at last return the mean.

        The first part runs inside the hook and must not wait; nor may any part wait for a future but by yielding it.
        """


def summed_dtype(exact_E: Tensor) -> torch.dtype:
    """What exact elements are summed in."""
    return torch.promote_types(exact_E.dtype, torch.float32)
