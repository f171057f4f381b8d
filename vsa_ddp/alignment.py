"""How much too short the mean of updates is, where each rank's optimizer divides by a second moment of its own.

On each of W ranks apart that holds W times the noise of the mean gradient's: where noise prevails, the mean of their
updates is sqrt(W) times shorter than the update of one Adam that saw all gradients. A rank's update times itself, over
its update times the ranks' mean one, is how much more noise it has than the mean, and the root of that is what it is
multiplied by before it is sent. Every rank finds that out by itself: what decoding adds to the mean has no part in the
rank's own update, so that the product is right on average.

Exact without momentum. Momentum takes noise, but not signal, out of updates, so with it the factor is between 1 and the
right one, and nearly right where noise prevails: never does it lengthen too much.

Shape letters: N elements of an update, P parameters in it.
"""

import torch
from torch import Tensor

_DECAY = 0.9


class Alignment:
    """What one rank knows of it, parameter by parameter, from its last ten or so updates.

    Args:
        sizes: elements of each parameter, in the order in which they lie in an update.
        world_size: W, the ranks whose updates are averaged.
    """

    def __init__(self, sizes: list[int], world_size: int, device: torch.device) -> None:
        self._sizes = sizes
        self._world_size = world_size
        self.moments_2P = torch.zeros(2, len(sizes), device=device)
        """Sums over past updates, the last ones weighing most: of this rank's squares, and of its products with the
        ranks' mean."""
        self._applied_P = torch.ones(len(sizes), device=device)

    def factors(self, num_steps: int, own_share: float) -> Tensor:
        """What an update of this rank is to be multiplied by. Shape: (P,).

        Args:
            num_steps: that the update is made of. Where the loss curves most, several steps reach what one does not,
                and overshoot if all are made longer: so the factor is one for one of them.
            own_share: of the second moment that divided it, what this rank's own gradients made, 0 to 1.
        """
        own_P, common_P = self.moments_2P
        quotient_P = torch.where(own_P < self._world_size * common_P, own_P / common_P, self._world_size)
        quotient_P = torch.where(own_P > 0, quotient_P, 1.0).clamp(min=1)
        return 1 + (torch.lerp(torch.ones_like(quotient_P), quotient_P, own_share).sqrt() - 1) / num_steps

    def lengthen_(self, update_N: Tensor, num_steps: int, own_share: float = 1.0) -> None:
        self._applied_P = self.factors(num_steps, own_share)
        for part, factor in zip(torch.split(update_N, self._sizes), self._applied_P, strict=True):
            part.mul_(factor)

    def observe(self, own_N: Tensor, mean_N: Tensor) -> None:
        """The update as the optimizer made it, and the ranks' mean of what they lengthened."""
        own, mean = (torch.split(update_N.float(), self._sizes) for update_N in (own_N, mean_N))
        own_P = torch.stack([part.square().sum() for part in own])
        common_P = torch.stack([(mine * ours).sum() for mine, ours in zip(own, mean, strict=True)]) / self._applied_P
        known_2P = self.moments_2P * _DECAY + torch.stack([own_P, common_P])
        self.moments_2P = torch.where(known_2P.isfinite().all(0), known_2P, self.moments_2P)
