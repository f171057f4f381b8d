"""Scales that all ranks share: the root mean square of each matrix's rows and columns.

s_ij = sqrt(r_i * c_j / mean(r)), with r and c the running means of the squared gradient over rows and columns. They are
averaged over the ranks as plain floats, which each rounds to bfloat16, so every rank holds the same bits; and measured
from the gradients before they are compressed: a scale read from decoded gradients would feed on the decoder's own
noise. Only ratios inside one matrix matter, the decoder multiplies by what the encoder divided by.

Source of the factoring: Shazeer and Stern 2018 (Adafactor), arXiv:1804.04235.

Shape letters: R rows, C columns, S = sum of R + C over the compressed parameters of a bucket.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vsa_ddp.hypervector import row_slices
from vsa_ddp.layout import BucketLayout

_FLOOR = 1e-3
"""Least row or column mean, relative to the matrix's: a row that had no gradient so far may get one."""


def mean_squares(layout: BucketLayout, bucket_N: Tensor) -> Tensor:
    """This rank's mean squares over each compressed parameter's rows, and then its columns.

    Summed in float64 and rounded to bfloat16: the same in any order of summation, but for one case in 1e12.
    Shapes: the bucket, of any float dtype -> (S,) float32.
    """
    parts = [torch.empty(0, dtype=torch.float32, device=bucket_N.device)]
    for s in layout.compressed:
        x_RC = bucket_N[s.offset : s.offset + s.numel].view(s.num_rows, s.num_cols)
        row_R = torch.empty(s.num_rows, dtype=torch.float64, device=bucket_N.device)
        col_C = torch.zeros(s.num_cols, dtype=torch.float64, device=bucket_N.device)
        for rows in row_slices(x_RC):
            squared = x_RC[rows].float().double().square_()
            row_R[rows] = squared.sum(1)
            col_C += squared.sum(0)
        parts += [row_R.div_(s.num_cols).bfloat16().float(), col_C.div_(s.num_rows).bfloat16().float()]
    return torch.cat(parts)


class Whitening:
    """The running means of all parameters seen so far, by name.

    Updated in place: on CUDA other streams may still read what would otherwise be freed.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._means: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, layout: BucketLayout, scales_S: Tensor) -> None:
        """Take the ranks' mean of `mean_squares` into the running means, of parameters where it is finite."""
        for s in layout.compressed:
            new_S, scales_S = scales_S.tensor_split([s.num_rows + s.num_cols])
            if s.name not in self._means:
                self._means[s.name] = torch.zeros_like(new_S[: s.num_rows]), torch.zeros_like(new_S[s.num_rows :])
            weight = new_S.isfinite().all().float().mul_(1.0 - self._decay)
            new_S = new_S.nan_to_num(0.0, 0.0, 0.0)
            row_R, col_C = self._means[s.name]
            row_R.lerp_(new_S[: s.num_rows], weight)
            col_C.lerp_(new_S[s.num_rows :], weight)

    def factors(self, layout: BucketLayout) -> Tensor:
        """Factors of the scales, s_ij = row_i * col_j, each parameter's rows and then its columns; ones if nothing was
        measured. Shapes: -> (S,) float32."""
        device = next((self._means[s.name][0].device for s in layout.compressed if s.name in self._means), None)
        factors = [torch.empty(0, dtype=torch.float32)]
        for s in layout.compressed:
            if s.name in self._means:
                factors += map(relative_root, self._means[s.name])
            else:
                factors.append(torch.ones(s.num_rows + s.num_cols, dtype=torch.float32, device=device))
        return torch.cat(factors[1:] or factors)

    def prepare(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Have zeros, which mean nothing was measured, for parameters that were not seen yet."""
        for name, shape in shapes:
            if name not in self._means:
                self._means[name] = torch.zeros(shape[0]), torch.zeros(math.prod(shape[1:]))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: {"row": row_R.clone(), "col": col_C.clone()} for name, (row_R, col_C) in self._means.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take copies of saved means."""
        self._means = {name: (pair["row"].clone(), pair["col"].clone()) for name, pair in state.items()}

    def to(self, layout: BucketLayout, device: torch.device) -> None:
        """Move the means of a bucket's parameters to its device."""
        for s in layout.compressed:
            if s.name in self._means:
                row_R, col_C = self._means[s.name]
                self._means[s.name] = row_R.to(device), col_C.to(device)


def relative_root(mean_squares: Tensor) -> Tensor:
    """Root mean squares relative to their matrix's; ones if all are zero."""
    # in float64 the mean is the same in any order of summation, so on any processor
    relative = mean_squares / mean_squares.double().mean().float()
    return torch.where(mean_squares.sum() > 0, relative, 1.0).clamp(min=_FLOOR).sqrt()
