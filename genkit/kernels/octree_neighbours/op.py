"""The 3x3x3 neighbours of all children of some nodes, from the neighbours of these nodes: one depth of an octree."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_neighbours = Operation("octree_neighbours")


def octree_neighbours(parents: Tensor, children: Tensor, *, path: str | None = None) -> Tensor:
    """[8 P, 27] int64: numbers of the nodes around each child, dz fastest, -1 = there is none.

    Args:
        parents: [P, 27] int64, numbers of the nodes around P nodes that have children, -1 = there is none.
        children: [M] int64, of every node of that depth: which of those with children it is, or -1. Its children are 8 children .. 8 children + 7, child
            4x + 2y + z.
        path: see genkit.dispatch.

    Not differentiable.

    Raises: ValueError for shapes that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if parents.ndim != 2 or parents.shape[1] != 27 or parents.dtype != torch.int64:
        raise ValueError(f"octree_neighbours: parents must be int64 [P, 27], got {parents.dtype} {list(parents.shape)}")
    if children.ndim != 1 or children.dtype != torch.int64 or children.device != parents.device:
        raise ValueError(
            f"octree_neighbours: children must be int64 [M] on {parents.device}, got {children.dtype} {list(children.shape)} on {children.device}"
        )
    return _neighbours(path, parents, children)
