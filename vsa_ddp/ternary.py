"""The 3-level Lloyd-Max quantiser of a Gaussian, with the level that makes it unbiased.

Beside it, for what the codec does not do: quantisers of a whole tensor, and one of several trits per element.

Shape letters: T rotation blocks of K elements, n trits per element.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vsa_ddp import rates
from vsa_ddp.hypervector import row_slices

THRESHOLD = 0.6120
"""Values beyond this many standard deviations become +-1."""
NMSE = rates.NMSES[1]
"""Squared error over energy for Gaussian input at the unbiased level, 0.2348; 0.1902 at the level of least error."""

STEPS = (1.2240, 0.5338, 0.2171)
"""Between the levels of 1, 2 and 3 trits per element, in standard deviations: the least error of a Gaussian."""
NMSES = (NMSE, 0.0317, 0.0047)
"""Squared error over energy for Gaussian input with 1, 2 and 3 trits per element, at the unbiased level."""


def quantize(y_TK: Tensor, sigma_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Ternarise each row at 0.612 of its standard deviation, or of one given: that of other ranks or an earlier step.

    Returns the trits and what `level` wants, each row's energy ||y||^2 and what was kept of it, <|y|, |trits|>. Sums of
    both over ranks that used the same sigma give the level that makes the sum of their trits unbiased. A sigma twice
    too large or too small raises the error of a Gaussian row from 0.23 to 0.55 or 0.31; zero gives signs, 0.57. A row
    of zeros gives zeros. Sums go pairwise in a fixed order, so all is the same on any processor.

    Shapes: (T, K) float32, (T,) float32 -> (T, K) int8 of {-1, 0, +1}, (T,) float32, (T,) float32. K a power of two.
    Source: Max 1960 (threshold).
    """
    num_rows, block = y_TK.shape
    trits_TK = torch.empty_like(y_TK, dtype=torch.int8)
    energy_T, kept_T = y_TK.new_empty(num_rows), y_TK.new_empty(num_rows)
    for rows in row_slices(y_TK):
        y = y_TK[rows]
        energy_T[rows] = row_sums(y.square())
        sigma = (energy_T[rows] / block).sqrt_() if sigma_T is None else sigma_T[rows]
        trits = signs_beyond(y, (THRESHOLD * sigma)[:, None])
        trits_TK[rows] = trits
        kept_T[rows] = row_sums(trits.mul_(y))
    return trits_TK, energy_T, kept_T


def signs_beyond(y: Tensor, threshold: Tensor) -> Tensor:
    """The sign of what is greater in size than the threshold, and 0 elsewhere. Shapes: that of y, floats."""
    # torch compares, and clamps by tensors, several times slower
    within = torch.minimum(torch.maximum(y, -threshold), threshold)
    return torch.sub(y, within, out=within).sign_()


def row_sums(x_TK: Tensor) -> Tensor:
    """Each row's sum, its halves added until one is left. Shapes: (T, K) -> (T,); K a power of two."""
    half = x_TK.shape[1]
    while half > 1:
        half //= 2
        x_TK = x_TK[:, :half] + x_TK[:, half:]
    return x_TK[:, 0]


def level(energy_T: Tensor, kept_T: Tensor) -> Tensor:
    """The value of trit +1: energy / kept; 0 where nothing was kept, not finite where the energy is not.

    It makes the estimate unbiased over random rotations whatever the row (for a Gaussian row it is 1.5115 sigma), and
    exact for a row of equal magnitudes.
    Source: Vargaftik et al. 2022 (EDEN), arXiv:2108.08842, section 3.
    """
    return torch.where((kept_T == 0) & energy_T.isfinite(), 0.0, energy_T / kept_T)


def dequantize(trits_TK: Tensor, levels_T: Tensor) -> Tensor:
    """trits * levels, float32. Shapes: (T, K), (T,) -> (T, K)."""
    return trits_TK * levels_T.float()[:, None]


def quantize_finely(y_TK: Tensor, trits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row to integers of so many balanced ternary digits: -1..1, -4..4 or -13..13 steps of a Gaussian.

    Returns the digits, those worth 1, then those worth 3, then 9, and what `level` wants: each row's energy and
    <y, integers>. With one trit it is `quantize`. Rows under 1e-19 in size come out as zeros.

    Shapes: (T, K) float32 -> (T, n * K) int8 of {-1, 0, +1}, (T,) float32, (T,) float32. K a power of two.
    Source: Max 1960 (the steps, by minimising the error).
    """
    num_rows, block = y_TK.shape
    top = 3**trits // 2
    digits_TnK = y_TK.new_empty(num_rows, trits * block, dtype=torch.int8)
    energy_T, kept_T = y_TK.new_empty(num_rows), y_TK.new_empty(num_rows)
    for rows in row_slices(y_TK):
        y = y_TK[rows]
        energy_T[rows] = row_sums(y.square())
        step = (energy_T[rows] / block).sqrt_().mul_(STEPS[trits - 1])
        # a row of zeros is divided by something, and stays
        q = (y / step.clamp_(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-top, top)
        kept_T[rows] = row_sums(q * y)
        for first in range(0, trits * block, block):
            higher = (q / 3).round_()  # never half way: the rest is -1, 0 or 1
            digits_TnK[rows, first : first + block] = q.sub_(higher, alpha=3)
            q = higher
    return digits_TnK, energy_T, kept_T


def dequantize_finely(digits_TnK: Tensor, levels_T: Tensor, trits: int) -> Tensor:
    """The integers of `quantize_finely` times levels. Shapes: (T, n * K) of any dtype, (T,) -> (T, K) float32."""
    *lower, q_TK = digits_TnK.chunk(trits, 1)
    for digits_TK in reversed(lower):
        q_TK = q_TK * 3 + digits_TK
    return dequantize(q_TK, levels_T)


class Ternary(NamedTuple):
    """A tensor as trits times one scale."""

    trits: Tensor
    """{-1, 0, +1}, int8, of the tensor's shape."""
    scale: Tensor
    """The value of trit +1: float32, no dimensions, not finite if the tensor is not."""

    def dequantize(self) -> Tensor:
        """trits * scale, float32."""
        return self.trits.float() * self.scale


def ternary_quantize_stochastic(
    x: Tensor, scale: float | None = None, *, generator: torch.Generator | None = None
) -> Ternary:
    """Round at random to -scale, 0 or +scale, with P(+-1) = |x| / scale: the mean over many draws is x.

    Args:
        scale: the largest size in x if None. What is larger than a scale given is clipped to it, which is biased.
        generator: where the random numbers come from, on x's device; None is torch's own, see `torch.manual_seed`.

    Its noise is |x| (scale - |x|) in each element: for 1000 values of a Gaussian twice their energy, where the
    deterministic quantiser makes 0.19. Use it where every single element has to be unbiased.

    Shapes: any real floats. Raises: TypeError for another dtype, ValueError if the scale is not above 0 and finite.
    Source: Wen et al. 2017 (TernGrad), arXiv:1705.07878.
    """
    x = _real(x)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}; leave it out to take the largest size in x.")
    size = x.abs()
    largest = size.amax() if size.numel() else size.new_zeros(())
    scale_0d = largest if scale is None else size.new_full((), scale)
    uniform = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device)
    # of zeros alone, 0 / 0 is no number, and nothing is less than that
    trits = torch.where(uniform < size / scale_0d, x.sign(), 0.0)
    return Ternary(trits.to(torch.int8), scale_0d)


def ternary_quantize_deterministic(
    x: Tensor, threshold: float | None = None, *, scale: Literal["least_squares", "unbiased"] = "least_squares"
) -> Ternary:
    """Round what is greater in size than a threshold to +-scale and the rest to 0.

    Args:
        threshold: None takes 0.612 root mean squares of x, the best one for a Gaussian.
        scale: "least_squares" is the mean size of what is beyond the threshold, which has the least error whatever x
            is: 0.19 of a Gaussian's energy. "unbiased" is energy / sum of what is beyond, see `level`: <estimate, x> =
            ||x||^2, at an error of 0.23.

    Shapes: any real floats. Sums are in float64. Raises: TypeError for another dtype, ValueError for a threshold below
    0 or not finite, and for another scale.
    Source: Max 1960 (threshold), Li and Liu 2016 (Ternary weight networks, the scale), arXiv:1605.04711.
    """
    x = _real(x)
    if threshold is not None and not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be at least 0 and finite, got {threshold}; leave it out for the best one.")
    if scale not in ("least_squares", "unbiased"):
        raise ValueError(f"scale must be least_squares or unbiased, got {scale!r}.")
    energy = x.square().sum(dtype=torch.float64)
    if threshold is None:
        threshold_0d = (energy / max(1, x.numel())).sqrt_().mul_(THRESHOLD).float()
    else:
        threshold_0d = x.new_full((), threshold)
    signs = signs_beyond(x, threshold_0d)
    kept = (signs * x).sum(dtype=torch.float64)
    weight = energy if scale == "unbiased" else kept
    divisor = kept if scale == "unbiased" else signs.abs().sum(dtype=torch.float64)
    return Ternary(signs.nan_to_num_(0.0).to(torch.int8), level(weight, divisor).float())


def _real(x: Tensor) -> Tensor:
    """As float32, without a graph."""
    if not x.is_floating_point():
        raise TypeError(f"x must have real floats, got {x.dtype}; convert it with .float().")
    return x.detach().float()
