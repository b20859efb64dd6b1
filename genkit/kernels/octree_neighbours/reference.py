"""Child by child and neighbour by neighbour: the specification that faster paths are compared with."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def octree_neighbours(parents: Tensor, children: Tensor) -> Tensor:
    """As `op.octree_neighbours`, arguments checked."""
    out = torch.full((len(parents), 8, 27), -1, dtype=torch.int64, device=parents.device)
    for child, offset in itertools.product(range(8), range(27)):
        # Where the neighbour lies among the 6x6x6 children of the 27 nodes around the parent.
        place = [2 + (child >> 2 - a & 1) + offset // 3 ** (2 - a) % 3 - 1 for a in range(3)]
        node = parents[:, place[0] // 2 * 9 + place[1] // 2 * 3 + place[2] // 2]
        first = torch.where(node >= 0, children[node.clamp_min(0)], -1)
        own = place[0] % 2 * 4 + place[1] % 2 * 2 + place[2] % 2
        out[:, child, offset] = torch.where(first >= 0, 8 * first + own, -1)
    return out.flatten(0, 1)
