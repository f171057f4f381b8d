"""What a setting sends and what it loses: bits per element, noise of the decoded gradient, and the least for a size.

    sparsity    bits per trit    noise over signal of one rounding, unbiased
    1           1.6              0.235
    2           1.0              0.571
    4           0.75             0.864
    8           0.5              1.52
    16          0.3125           2.71
    32          0.1875           4.81
    64          0.1094           8.50
    128         0.0625           15.0

A bundle of B slots divides the bits by B, and multiplies what is not signal. Plain numbers: no tensors, no processes.
"""

import math

NMSES = {1: 0.2348, 2: 0.5708, 4: 0.8644, 8: 1.5154, 16: 2.7082, 32: 4.8089, 64: 8.4958, 128: 15.010}
"""Squared error over energy of a Gaussian row by sparsity n, at the unbiased level: of the ternary quantiser for 1, of
block codes n / m^2 - 1, m the mean of the largest size of n standard Gaussians."""
MAX_BUNDLE = 4096


def bits_per_trit(sparsity: int) -> float:
    """Five trits to a byte; or of n trits the largest one's place and sign."""
    return 1.6 if sparsity == 1 else sparsity.bit_length() / sparsity


def num_roundings(wire: str) -> int:
    """How often a value is quantised on its way: `two_shot` does it with the sum again."""
    return 2 if wire == "two_shot" else 1


def unbiased_nmse(bundle: int, sparsity: int = 1, roundings: int = 1) -> float:
    """Noise over signal of one rank's decoded gradient, unbiased, with full slots: B * (1 + NMSE) - 1. A second
    rounding finds the noise of the first to be signal, where the ranks' gradients have little in common."""
    return bundle * (1.0 + NMSES[sparsity]) ** roundings - 1.0


def least_noise(compression: float, wire: str) -> tuple[int, int]:
    """Bundle and sparsity that send at most 1 / compression of float32's bits, with the least noise for that."""
    sparsities = [1] if wire == "all_reduce" else list(NMSES)  # a network sums all trits or none
    settings = [(math.ceil(compression * bits_per_trit(n) / 32), n) for n in sparsities]
    return min(settings, key=lambda s: unbiased_nmse(s[0], s[1], num_roundings(wire)))
