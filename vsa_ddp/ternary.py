"""The 3-level Lloyd-Max quantiser of a Gaussian, with the level that makes it unbiased.

Shape letters: T rotation blocks of K elements.
"""

import torch
from torch import Tensor

THRESHOLD = 0.6120
"""Values beyond this many standard deviations become +-1."""
NMSE = 0.2348
"""Squared error over energy for Gaussian input at the unbiased level; 0.1902 at the level of least error."""


def elements_at_once(device: torch.device) -> int:
    """What to work on at a time: on a CPU core 1 MiB of float32, which stays in its cache; on a GPU all there is.

    No bit depends on it.
    """
    return 2**18 if device.type == "cpu" else 2**62


def quantize(y_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Ternarise each row. Returns (trits, levels); `dequantize` gives an unbiased estimate of y.

    The level is ||y||^2 / <|y|, |trits|>, which makes the estimate unbiased over random rotations whatever the row
    (for a Gaussian row it is 1.5115 sigma) and exact for a row of equal magnitudes. A row of zeros gives zeros; a row
    with a value that is not finite gives a level that is not finite.

    Shapes: (T, K) float32 -> (T, K) int8 of {-1, 0, +1}, (T,) float32.
    Source: Max 1960 (threshold); Vargaftik et al. 2022 (EDEN), arXiv:2108.08842, section 3 (level).
    """
    trits_TK, energy_T, kept_T = _ternarise(y_TK, None)
    return trits_TK, level(energy_T, kept_T)


def quantize_at(y_TK: Tensor, sigma_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ternarise each row at a given standard deviation, that of other ranks or of an earlier step.

    Returns the trits and what `level` wants, the row's energy ||y||^2 and what was kept of it <|y|, |trits|>. Sums of
    both over ranks that used the same sigma give the level that makes the sum of their trits unbiased. A sigma twice
    too large or too small raises the error of a Gaussian row from 0.23 to 0.55 or 0.31; zero gives signs, 0.57.

    Shapes: (T, K) float32, (T,) float32 -> (T, K) int8, (T,) float32, (T,) float32.
    """
    return _ternarise(y_TK, sigma_T)


def _ternarise(y_TK: Tensor, sigma_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The trits, each row's energy and what the trits keep of it; at the rows' own sigma if none is given."""
    num_rows, block = y_TK.shape
    trits_TK = torch.empty_like(y_TK, dtype=torch.int8)
    energy_T, kept_T = y_TK.new_empty(num_rows), y_TK.new_empty(num_rows)
    step = max(1, elements_at_once(y_TK.device) // block)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        y = y_TK[rows]
        energy_T[rows] = y.square().sum(1)
        sigma = (energy_T[rows] / block).sqrt_() if sigma_T is None else sigma_T[rows]
        threshold = (THRESHOLD * sigma)[:, None]
        # the sign of what is beyond the threshold: torch compares, and clamps by tensors, several times slower
        within = torch.minimum(torch.maximum(y, -threshold), threshold)
        trits = torch.sub(y, within, out=within).sign_()
        trits_TK[rows] = trits
        kept_T[rows] = trits.mul_(y).sum(1)
    return trits_TK, energy_T, kept_T


def level(energy_T: Tensor, kept_T: Tensor) -> Tensor:
    """The value of trit +1: energy / kept; 0 where nothing was kept, not finite where the energy is not."""
    return torch.where((kept_T == 0) & energy_T.isfinite(), 0.0, energy_T / kept_T)


def dequantize(trits_TK: Tensor, levels_T: Tensor) -> Tensor:
    """trits * levels, float32. Shapes: (T, K), (T,) -> (T, K)."""
    return trits_TK * levels_T.float()[:, None]


def add_dequantized_(y_TK: Tensor, trits_TK: Tensor, levels_T: Tensor) -> Tensor:
    """y += dequantize(trits, levels), in place and in one pass. Shapes: (T, K) float32 twice, (T,) -> (T, K)."""
    return y_TK.addcmul_(trits_TK, levels_T.float()[:, None])
