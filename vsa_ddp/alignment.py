"""How much too short the mean of the updates is that the ranks' own Adams made.

Adam divides by the root of its gradients' second moment, and on each of W ranks apart that has W times the noise that
the mean gradient's would have. Where noise prevails, the mean of their updates is sqrt(W) times shorter than the update
of an optimizer that saw all gradients. The square of that is a rank's update times itself over its update times the
ranks' mean one, which all ranks have: decoding adds noise to it of mean zero, so this product is right on average.

Shape letters: N elements of all parameters, P parameters.
"""

import torch
from torch import Tensor

_DECAY = 0.9


class Alignment:
    """One rank's measure of it, parameter by parameter, over some ten updates.

    Args:
        sizes: elements of each parameter, in the order in which they lie in an update.
        world_size: W, the ranks whose updates are averaged.
        period: steps of the optimizer in each update. Several of them reach what one does not, where the loss curves
            most, and the more of them were lengthened the more they overshot: so it is one of them.
    """

    def __init__(self, sizes: list[int], world_size: int, period: int, device: torch.device) -> None:
        self._sizes = sizes
        self._world_size = world_size
        self._period = period
        self.moments_2P = torch.zeros(2, len(sizes), device=device)
        """Sums over past updates, the last ones weighing most: of this rank's squares, and of its products with the
        ranks' mean."""

    def factors(self) -> Tensor:
        """What an update of this rank is to be multiplied by: 1 to sqrt(W) for one step. Shape: (P,)."""
        own_P, common_P = self.moments_2P
        quotient_P = torch.where(own_P < self._world_size * common_P, own_P / common_P, self._world_size)
        of_one_P = torch.where(own_P > 0, quotient_P, 1.0).clamp(min=1).sqrt()
        return 1 + (of_one_P - 1) / self._period

    def lengthen_(self, update_N: Tensor) -> None:
        for part, factor in zip(torch.split(update_N, self._sizes), self.factors(), strict=True):
            part.mul_(factor)

    def observe(self, own_N: Tensor, mean_N: Tensor) -> None:
        """An update of this rank as its optimizer made it, and the mean of what the ranks lengthened."""
        own, mean = (torch.split(update_N.float(), self._sizes) for update_N in (own_N, mean_N))
        own_P = torch.stack([part.square().sum() for part in own])
        common_P = torch.stack([(mine * all_).sum() for mine, all_ in zip(own, mean, strict=True)]) / self.factors()
        self.moments_2P.mul_(_DECAY).add_(torch.stack([own_P, common_P]))
