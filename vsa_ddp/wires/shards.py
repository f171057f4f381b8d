"""Equal shares of a tensor's rows, one for each rank. Shape letters: W ranks, n rows, m = ceil(n / W) of a share."""

import torch
from torch import Tensor


def shards(rows: Tensor, num_ranks: int) -> Tensor:
    """Split the first dimension; the last shares are filled with zeros. Shapes: (n, ...) -> (W, m, ...)."""
    share = -(-rows.shape[0] // num_ranks)
    fill = rows.new_zeros(share * num_ranks - rows.shape[0], *rows.shape[1:])
    return torch.cat([rows, fill]).view(num_ranks, share, *rows.shape[1:])


def joined(shards_Wm: Tensor, num_rows: int) -> Tensor:
    """Invert `shards`. Shapes: (W, m, ...), which may have gaps between the ranks -> (n, ...) without."""
    return shards_Wm.flatten(0, 1)[:num_rows].contiguous()
