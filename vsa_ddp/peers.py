"""Who exchanges messages, and the wire that they begin with if told none."""

import os

import torch.distributed as dist

from vsa_ddp.config import VsaConfig, WireName
from vsa_ddp.nodes import group_by_node

MANY_PEERS = 4
"""More gather more than it is worth where the link is slow."""


def local_world_size(config: VsaConfig) -> str | None:
    """What torchrun says, if nodes go by that."""
    return os.environ.get("LOCAL_WORLD_SIZE") if config.ranks_per_node == "local" else None


def find_peers(
    group: dist.ProcessGroup, config: VsaConfig, mesh: list[list[int]] | None
) -> tuple[list[list[int]] | None, int]:
    """The group's ranks by node, None if each is one, and how many nodes exchange messages. Raises: ValueError if the
    ranks do not divide evenly, or are not those of the mesh."""
    ranks = dist.get_process_group_ranks(group)
    nodes = group_by_node(ranks, config.ranks_per_node, local_world_size(config), mesh)
    return nodes, len(nodes) if nodes else len(ranks)


def default_wire(group: dist.ProcessGroup, config: VsaConfig, mesh: list[list[int]] | None = None) -> WireName:
    """What ranks begin with that were told no wire: "two_shot" if more than `MANY_PEERS` would gather.

    It takes process groups of its own, so only all ranks of a job have it. Nodes that cannot be are found, on every
    rank, when the ranks meet.
    """
    if group is not dist.group.WORLD:
        return "all_gather"
    try:
        _, num_peers = find_peers(group, config, mesh)
    except ValueError:
        return "all_gather"
    return "two_shot" if num_peers > MANY_PEERS else "all_gather"
