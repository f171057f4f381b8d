"""Do all ranks mean the same? Asked once, at the first bucket, before any gradient is sent."""

from typing import Any

import torch.distributed as dist


def check_agreement(mine: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Compare `mine` with every other rank's. Blocks; collective over `group`.

    Raises: ValueError on every rank, naming each entry that differs with its values by rank of the group.
    """
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    names = sorted({name for theirs in everyone for name in theirs})
    differences = []
    for name in names:
        values = [theirs.get(name) for theirs in everyone]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            differences.append(f"{name} ({listed})")
    if differences:
        raise ValueError(
            f"all ranks must use the same settings for vsa_ddp, but they differ in {'; '.join(differences)}. "
            "Pass the same settings, seed and checkpoint on every rank."
        )
