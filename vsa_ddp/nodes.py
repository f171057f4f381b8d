"""Which ranks share a node. Integers only."""

from typing import Any, Literal

RanksPerNode = int | Literal["local"]


def check_mesh(members: list[Any], ranks_per_node: RanksPerNode) -> list[list[int]]:
    """The ranks of a mesh, given as nested lists, by node.

    Raises: ValueError if it has not two dimensions, nodes and ranks of a node, or nodes are given twice.
    """
    if not members or not isinstance(members[0], list) or isinstance(members[0][0], list):
        raise ValueError(f"the mesh must have two dimensions, nodes and ranks of a node, got {members}.")
    if ranks_per_node != 1:
        raise ValueError(f"give either a mesh or ranks_per_node, got both: {members} and {ranks_per_node!r}.")
    return members


def group_by_node(
    ranks: list[int], ranks_per_node: RanksPerNode, local_world_size: str | None, mesh: list[list[int]] | None
) -> list[list[int]] | None:
    """Positions in `ranks` by node, or None if every rank is a node of its own.

    Args:
        ranks: the group's members, in its order.
        ranks_per_node: so many consecutive members form a node; "local" takes those that torchrun started on one
            machine, `local_world_size` consecutive ranks of the whole job.
        local_world_size: torchrun's LOCAL_WORLD_SIZE, if it is set.
        mesh: the members by node, instead of all that.

    Raises: ValueError if the members do not divide evenly, or are not those of the mesh.
    """
    if mesh is not None:
        if sorted(rank for node in mesh for rank in node) != sorted(ranks):
            raise ValueError(f"the mesh must hold the ranks of the DDP model's group {ranks}, got {mesh}.")
        return [[ranks.index(rank) for rank in node] for node in mesh] if len(mesh[0]) > 1 else None
    if ranks_per_node == "local":
        if local_world_size is None or not local_world_size.isdecimal() or int(local_world_size) < 1:
            raise ValueError(
                f'ranks_per_node="local" reads LOCAL_WORLD_SIZE, which torchrun sets, got {local_world_size!r}; give '
                "the number of ranks in a node instead."
            )
        machines: dict[int, list[int]] = {}
        for position, rank in enumerate(ranks):
            machines.setdefault(rank // int(local_world_size), []).append(position)
        nodes = list(machines.values())
        if len({len(node) for node in nodes}) > 1:
            raise ValueError(
                f'ranks_per_node="local" needs as many ranks of the DDP model\'s group on every machine, got '
                f"{[len(node) for node in nodes]}."
            )
        return nodes if len(nodes[0]) > 1 else None
    if len(ranks) % ranks_per_node:
        raise ValueError(
            f"ranks_per_node must divide the {len(ranks)} ranks of the DDP model's group, got {ranks_per_node}."
        )
    if ranks_per_node == 1:
        return None
    members = list(range(len(ranks)))
    return [members[start : start + ranks_per_node] for start in range(0, len(ranks), ranks_per_node)]
