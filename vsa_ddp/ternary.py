"""The 3-level Lloyd-Max quantiser of a Gaussian, with the level that makes it unbiased.

Shape letters: T rotation blocks of K elements.
"""

import torch
from torch import Tensor

THRESHOLD = 0.6120
"""Values beyond this many standard deviations become +-1."""
NMSE = 0.2348
"""Squared error over energy for Gaussian input at the unbiased level; 0.1902 at the level of least error."""


def quantize(y_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Ternarise each row. Returns (trits, levels); `dequantize` gives an unbiased estimate of y.

    The level is ||y||^2 / <|y|, |trits|>, which makes the estimate unbiased over random rotations whatever the row
    (for a Gaussian row it is 1.5115 sigma) and exact for a row of equal magnitudes. A row of zeros gives zeros; a row
    with a value that is not finite gives a level that is not finite.

    Shapes: (T, K) float32 -> (T, K) int8 of {-1, 0, +1}, (T,) float32.
    Source: Max 1960 (threshold); Vargaftik et al. 2022 (EDEN), arXiv:2108.08842, section 3 (level).
    """
    energy_T = y_TK.square().sum(1)
    trits_TK, kept_T = _threshold(y_TK, (energy_T / y_TK.shape[1]).sqrt_())
    return trits_TK, level(energy_T, kept_T)


def quantize_at(y_TK: Tensor, sigma_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ternarise each row at a given standard deviation, that of other ranks or of an earlier step.

    Returns the trits and what `level` wants, the row's energy ||y||^2 and what was kept of it <|y|, |trits|>. Sums of
    both over ranks that used the same sigma give the level that makes the sum of their trits unbiased. A sigma twice
    too large or too small raises the error of a Gaussian row from 0.23 to 0.55 or 0.31; zero gives signs, 0.57.

    Shapes: (T, K) float32, (T,) float32 -> (T, K) int8, (T,) float32, (T,) float32.
    """
    trits_TK, kept_T = _threshold(y_TK, sigma_T)
    return trits_TK, y_TK.square().sum(1), kept_T


def _threshold(y_TK: Tensor, sigma_T: Tensor) -> tuple[Tensor, Tensor]:
    """The trits, and what they keep of each row."""
    threshold_T1 = (THRESHOLD * sigma_T)[:, None]
    trits_TK = (y_TK > threshold_T1).to(torch.int8).sub_((y_TK < -threshold_T1).to(torch.int8))
    return trits_TK, (y_TK * trits_TK).sum(1)


def level(energy_T: Tensor, kept_T: Tensor) -> Tensor:
    """The value of trit +1: energy / kept; 0 where nothing was kept, not finite where the energy is not."""
    return torch.where((kept_T == 0) & energy_T.isfinite(), 0.0, energy_T / kept_T)


def dequantize(trits_TK: Tensor, levels_T: Tensor) -> Tensor:
    """trits * levels, float32. Shapes: (T, K), (T,) -> (T, K)."""
    return trits_TK * levels_T.float()[:, None]
