"""Which ranks share a node, however it is said."""

import pytest

from vsa_ddp.nodes import RanksPerNode, check_mesh, group_by_node


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "local", "mesh", "nodes"),
    [
        ([0, 1, 2, 3], 1, None, None, None),
        ([0, 1, 2, 3], 2, None, None, [[0, 1], [2, 3]]),
        ([0, 1, 2, 3], "local", "2", None, [[0, 1], [2, 3]]),
        ([0, 1, 2, 3], "local", "1", None, None),
        ([0, 1], "local", "2", None, [[0, 1]]),
        # a group of one rank from each machine has no nodes, whatever the machines hold
        ([0, 2], "local", "2", None, None),
        ([4, 5, 6, 7], "local", "4", None, [[0, 1, 2, 3]]),
        ([1, 3, 5, 7], 1, None, [[1, 5], [3, 7]], [[0, 2], [1, 3]]),
        ([0, 1], 1, None, [[0], [1]], None),
    ],
)
def test_members_are_grouped(
    ranks: list[int],
    ranks_per_node: RanksPerNode,
    local: str | None,
    mesh: list[list[int]] | None,
    nodes: list[list[int]] | None,
) -> None:
    assert group_by_node(ranks, ranks_per_node, local, mesh) == nodes


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "local", "mesh", "text"),
    [
        ([0, 1, 2], 2, None, None, "must divide the 3 ranks of the DDP model's group, got 2"),
        ([0, 1, 2], "local", "2", None, r"as many ranks of the DDP model's group on every machine, got \[2, 1\]"),
        ([0, 1], "local", None, None, "LOCAL_WORLD_SIZE, which torchrun sets, got None"),
        ([0, 1], "local", "0", None, "LOCAL_WORLD_SIZE, which torchrun sets, got '0'"),
        ([0, 1], 1, None, [[0, 2]], r"must hold the ranks of the DDP model's group \[0, 1\], got \[\[0, 2\]\]"),
    ],
)
def test_what_cannot_be_is_named(
    ranks: list[int], ranks_per_node: RanksPerNode, local: str | None, mesh: list[list[int]] | None, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        group_by_node(ranks, ranks_per_node, local, mesh)


def test_a_mesh_has_two_dimensions_and_stands_alone() -> None:
    assert check_mesh([[0, 1], [2, 3]], 1) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="two dimensions"):
        check_mesh([[[0, 1]], [[2, 3]]], 1)
    with pytest.raises(ValueError, match="either a mesh or ranks_per_node"):
        check_mesh([[0, 1]], 2)
