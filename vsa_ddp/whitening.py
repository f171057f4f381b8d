"""Scales that all ranks share: the root mean square of each matrix's rows and columns.

s_ij = sqrt(r_i * c_j / mean(r)), with r and c the running means of the squared gradient over rows and columns. They are
averaged over the ranks as plain floats (rounded to bfloat16 beside compressed gradients), so every rank holds the same
bits, and measured from the gradients before they are compressed: a scale read from decoded gradients would feed on the
decoder's own noise. Only ratios inside one matrix matter, the decoder multiplies by what the encoder divided by.

Source of the factoring: Shazeer and Stern 2018 (Adafactor), arXiv:1804.04235.

Shape letters: R rows, C columns, S = sum of R + C over the compressed parameters of a bucket.
"""

import torch
from torch import Tensor

from vsa_ddp.layout import BucketLayout

_FLOOR = 1e-3
"""Least row or column mean, relative to the matrix's: a row that had no gradient so far may get one."""


class Whitening:
    """The running means of all parameters seen so far, by name.

    Updated in place: on CUDA other streams may still read what would otherwise be freed.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._means: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(self, layout: BucketLayout, gradients: list[Tensor]) -> Tensor:
        """This rank's mean squares over rows and columns. Shapes: the bucket's gradients -> (S,) float32."""
        parts = []
        for s, gradient in zip(layout.slices, gradients, strict=True):
            if s.num_dims:
                squared_RC = gradient.reshape(s.num_rows, s.num_cols).float().square()
                parts += [squared_RC.mean(1), squared_RC.mean(0)]
        return torch.cat(parts) if parts else gradients[0].new_empty(0, dtype=torch.float32)

    def update(self, layout: BucketLayout, scales_S: Tensor) -> None:
        """Take the ranks' mean of `measure` into the running means. A parameter's that is not finite is left out."""
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
        factors = [torch.empty(0, dtype=torch.float32)]
        for s in layout.compressed:
            if s.name in self._means:
                factors += map(_root, self._means[s.name])
            else:
                factors.append(torch.ones(s.num_rows + s.num_cols, dtype=torch.float32))
        return torch.cat(factors[1:] or factors)

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


def _root(mean_squares: Tensor) -> Tensor:
    """Root mean squares relative to their matrix's; ones if all are zero."""
    relative = mean_squares / mean_squares.mean()
    return torch.where(mean_squares.sum() > 0, relative, 1.0).clamp(min=_FLOOR).sqrt()
