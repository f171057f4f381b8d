"""Standard deviations of the hypervectors' rows, known to all ranks one step ahead.

A wire that sums trits needs one threshold for all ranks before any of them has spoken. It takes the last step's, which
came back with the last step's sum: no round trip, and the quantiser hardly minds (see `ternary.quantize`). Kept by
parameter: T_p values for its T_p rotation blocks.

Shape letters: T rotation blocks of a bucket.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from vsa_ddp.layout import BucketLayout, Slice


class SharedSigma:
    """The last step's standard deviations by parameter's name; zero before the first. Updated in place."""

    def __init__(self) -> None:
        self._sigmas: dict[str, Tensor] = {}

    def of(self, layout: BucketLayout, device: torch.device) -> Tensor:
        """Shapes: -> (T,) float32."""
        empty = torch.zeros(0, dtype=torch.float32, device=device)
        return torch.cat([empty, *(self._stored(s, layout, device) for s in layout.compressed)])

    def update(self, layout: BucketLayout, sigma_T: Tensor) -> None:
        """Take this step's; where it is not finite (an overflow), the last one stays.

        It may double at most: after a step that was eight times as loud, a threshold of its size would leave nothing of
        the next one, while one that is too small does little harm (see `ternary.quantize`).
        """
        for s in layout.compressed:
            first = s.start // layout.rotation_block
            new = sigma_T[first : first + s.num_dims // layout.rotation_block]
            old = self._stored(s, layout, sigma_T.device)
            limited = torch.where(old > 0, torch.minimum(new, 2 * old), new)
            old.copy_(torch.where(new.isfinite(), limited, old))

    def forget(self) -> None:
        """What comes next is of another size: begin without."""
        for sigma in self._sigmas.values():
            sigma.zero_()

    def _stored(self, s: Slice, layout: BucketLayout, device: torch.device) -> Tensor:
        num_blocks = s.num_dims // layout.rotation_block
        sigma = self._sigmas.get(s.name)
        if sigma is None or sigma.shape[0] != num_blocks:  # never sent, or loaded from a run with another bundle
            sigma = self._sigmas[s.name] = torch.zeros(num_blocks, dtype=torch.float32, device=device)
        elif sigma.device != device:
            sigma = self._sigmas[s.name] = sigma.to(device)
        return sigma

    def prepare(self, num_blocks: Iterable[tuple[str, int]]) -> None:
        """Have zeros, which mean not known, for parameters that were not seen yet, with their rotation blocks."""
        for name, num in num_blocks:
            self._sigmas.setdefault(name, torch.zeros(num))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: sigma.clone() for name, sigma in self._sigmas.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sigmas = {name: sigma.clone() for name, sigma in state.items()}
