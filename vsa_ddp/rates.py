"""What a setting sends and what it loses: bits per element, noise of the decoded gradient, and the least for a size.

Plain numbers: no tensors, no processes.
"""

import math

NMSES = {1: 0.2348, 2: 0.5708, 4: 0.8644, 8: 1.5154, 16: 2.7082, 32: 4.8089, 64: 8.4958, 128: 15.010}
"""Squared error over energy of a Gaussian row by sparsity n, at the unbiased level: of the ternary quantiser for 1, of
block codes n / m^2 - 1, m the mean of the largest size of n standard Gaussians."""
MAX_BUNDLE = 4096


def code_bits(sparsity: int) -> int:
    """Bits of a block code: the place of its trit and a sign."""
    return sparsity.bit_length()


def bits_per_trit(sparsity: int) -> float:
    """Five trits to a byte; or of n trits one block code."""
    return 1.6 if sparsity == 1 else code_bits(sparsity) / sparsity


def num_roundings(wire: str) -> int:
    """How often a value is quantised on its way: `two_shot` does it with the sum again."""
    return 2 if wire == "two_shot" else 1


def unbiased_nmse(bundle: int, sparsity: int = 1, roundings: int = 1) -> float:
    """Noise over signal of one rank's decoded gradient, unbiased, with full slots: B * (1 + NMSE) - 1. A second
    rounding finds the noise of the first to be signal, where the ranks' gradients have little in common."""
    return bundle * (1.0 + NMSES[sparsity]) ** roundings - 1.0


def least_noise(compression: float, wire: str, rotation_block: int) -> tuple[int, int]:
    """Bundle and sparsity that send at most 1 / compression of float32's bits, with the least noise for that.

    Raises: ValueError if nothing sends so little.
    """
    # A network sums all trits or none; eights of block codes fill whole bytes
    most_sparse = 1 if wire == "all_reduce" else rotation_block // 8
    codes = [(math.ceil(compression * bits_per_trit(n) / 32), n) for n in NMSES if n <= most_sparse]
    possible = [(bundle, n) for bundle, n in codes if bundle <= MAX_BUNDLE]
    if not possible:
        most = max(32 * MAX_BUNDLE / bits_per_trit(n) for _, n in codes)
        raise ValueError(
            f'compression must be at most {most:.0f} with wire="{wire}" and a rotation_block of {rotation_block}, got '
            f"{compression!r}."
        )
    return min(possible, key=lambda code: unbiased_nmse(code[0], code[1], num_roundings(wire)))
