"""Do all ranks still hold the same parameters? Looked at now and then: what parts them (a skipped step, another seed,
broken memory) is seen nowhere else, for the loss goes on falling.

One number per parameter travels, beside its square: W sum(d^2) = sum(d)^2 means that all W ranks have the same d. In
integers modulo 2**64, so there are no false alarms, and every rank comes to the same answer. Ranks that have run out of
data (DDP's `join`) get everyone's parameters in the end and do not count until then: they send zeros, and W counts the
others.

Shape letters: P parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from vsa_ddp.agreement import fingerprint
from vsa_ddp.wires import Inspection, Link

_DIGEST_BITS = 31


class ReplicaCheck:
    """Compares the ranks' parameters, one step behind: nobody waits."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._under_way: tuple[Future[Any], Tensor, int, Sequence[str]] | None = None

    def due(self, step: int) -> bool:
        """Whether this step begins with a comparison. A pure function of the step."""
        return self._interval > 0 and step > 0 and step % self._interval == 0

    def begin(
        self, named_parameters: Sequence[tuple[str, Tensor]], link: Link, step: int, *, counts: bool = True
    ) -> None:
        """Send this rank's digests, or zeros if it does not count; returns at once.

        Collective: every rank calls it at the same steps.
        """
        digests_P = fingerprint(p for _, p in named_parameters) % 2**_DIGEST_BITS
        sums = torch.cat([digests_P, digests_P.square(), digests_P.new_ones(1)]).mul_(counts)
        future = link.all_reduce_sum_(sums)
        self._under_way = future, sums, step, [name for name, _ in named_parameters]

    def finish(self, inspection: Inspection) -> None:
        """Look at the answer to the last `begin`, if there was one.

        Raises: RuntimeError naming the first parameter that differs, on every rank; with GPUs at a later step.
        """
        if self._under_way is None:
            return
        future, sums, step, names = self._under_way
        self._under_way = None
        future.wait()
        sums_P, squares_P, num_ranks = sums.tensor_split([len(names), 2 * len(names)])

        def complaint(same_P: Tensor) -> str:
            bad = [name for name, same in zip(names, same_P.tolist(), strict=True) if not same]
            others = f" and {len(bad) - 1} more of {len(names)}" if len(bad) > 1 else ""
            return (
                f"parameters differ between ranks before step {step}: {bad[0]}{others}. Something changes them on some "
                "ranks alone: another seed, skipped optimizer steps, a checkpoint loaded by some. Go on from a "
                "checkpoint that all ranks load."
            )

        inspection.expect(squares_P * num_ranks == sums_P.square(), complaint)
