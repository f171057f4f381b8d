"""How much too short the mean of updates is, where each rank's optimizer divides by a second moment of its own.

On each of W ranks apart that holds W times the noise of the mean gradient's: where noise prevails, the mean of their
updates is sqrt(W) times shorter than the update of one Adam that saw all gradients. A rank's update times itself, over
its update times the ranks' mean one, is how much more noise it has than the mean, and the root of that is what it is
multiplied by before it is sent. Every rank finds that out by itself: what decoding adds to the mean has no part in the
rank's own update, so that the product is right on average.

Exact without momentum. Momentum takes noise, but not signal, out of updates, so with it the factor is between 1 and the
right one on average, and nearly right where noise prevails.

Shape letters: N elements of an update, P parameters in it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

_DECAY = 0.9


class SecondMoment:
    """How much of an optimizer's second moment came from this rank's gradients alone.

    The rest came while ranks averaged their gradients, in a warm-up or before the optimizer's state was loaded.
    """

    def __init__(self, optimizer: Optimizer | None, warmup_steps: int) -> None:
        self._optimizer = optimizer
        self._warmup_steps = warmup_steps
        self.steps_together: int | None = None
        """Before ranks parted; None until somebody asks."""

    def own_share(self, steps_apart: int) -> float:
        """0 to 1, after so many steps alone; 1 for an optimizer that counts no steps, without a warm-up."""
        if self.steps_together is None:
            states = self._optimizer.state.values() if self._optimizer else ()
            taken = next((int(state["step"]) for state in states if "step" in state), 0)
            self.steps_together = max(taken - steps_apart, self._warmup_steps)
        decay, steps = self._decay(), self.steps_together + steps_apart
        return (1 - decay**steps_apart) / (1 - decay**steps) if decay < 1 else steps_apart / steps

    def _decay(self) -> float:
        """By what it forgets: Adam's beta2, RMSprop's alpha, Adadelta's rho; 1, a sum as Adagrad's, for all others."""
        group = self._optimizer.param_groups[0] if self._optimizer else {}
        betas = group.get("betas") or (0, group.get("alpha") or group.get("rho") or 1)
        return float(max(betas[1:], default=1))


class Alignment:
    """What one rank knows of its noise, parameter by parameter, from its last ten or so updates.

    Args:
        sizes: elements of each parameter, in the order in which they lie in an update.
        world_size: W, the ranks whose updates are averaged.
        device: where updates are.
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
            num_steps: that the update is made of; the factor's excess over 1 is divided by it. Where the loss curves
                most, several steps reach what one does not, and overshoot when they are lengthened.
            own_share: of the second moment that divided it, as `SecondMoment` says.
        """
        own_P, common_P = self.moments_2P
        quotient_P = torch.where(own_P < self._world_size * common_P, own_P / common_P, self._world_size)
        quotient_P = torch.where(own_P > 0, quotient_P, 1.0).clamp(min=1)
        return 1 + (torch.lerp(torch.ones_like(quotient_P), quotient_P, own_share).sqrt() - 1) / num_steps

    def lengthen_(self, update_N: Tensor, num_steps: int, own_share: float = 1.0) -> None:
        """Multiply each parameter's part by its factor."""
        self._applied_P = self.factors(num_steps, own_share)
        torch._foreach_mul_(torch.split(update_N, self._sizes), self._applied_P.unbind())

    def observe(self, updates: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Of each parameter, in order: the update as the optimizer made it, and the ranks' mean of what they sent, of
        the same shape."""
        found_2P = torch.stack([_products(own.float(), mean.float()) for own, mean in updates], 1)
        found_2P[1] /= self._applied_P
        known_2P = self.moments_2P * _DECAY + found_2P
        self.moments_2P = torch.where(known_2P.isfinite().all(0), known_2P, self.moments_2P)


def _products(own: Tensor, mean: Tensor) -> Tensor:
    """An update with itself, and with the ranks' mean one. Shape: (2,)."""
    # not by `dot`, whose rounding depends on where in memory its arguments lie, nor by a norm, which rounds more
    return torch.stack([own.square().sum(), (own * mean).sum()])
