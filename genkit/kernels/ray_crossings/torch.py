"""All points go down the tree together, level by level."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.kernels.ray_crossings.reference import crossing

_POINTS = 1 << 13  # looked at together
_FIRST = 3  # level, of 8 boxes, that a search begins at


def ray_crossings(points: Tensor, boxes: Tensor, triangles: Tensor, slack: float) -> Tensor:
    """As `reference.ray_crossings`."""
    return torch.cat([_count(some, boxes, triangles, slack) for some in points.split(_POINTS)])


def _count(points: Tensor, boxes: Tensor, triangles: Tensor, slack: float) -> Tensor:
    depth = (len(boxes) + 1).bit_length() - 2
    first = min(_FIRST, depth)
    who = torch.arange(len(points)).repeat_interleave(1 << first)
    node = torch.arange(1 << first).repeat(len(points))
    rough = points.float()
    for level in range(first, depth + 1):
        if level > first:
            who, node = who.repeat_interleave(2), torch.stack([2 * node, 2 * node + 1], 1).reshape(-1)
        low, high = boxes[node + (1 << level) - 1].split(3, 1)
        place = rough[who]
        under = (place <= high + slack).all(1) & (place[:, :2] >= low[:, :2] - slack).all(1)
        who, node = who[under], node[under]
    real = node < len(triangles)
    who, node = who[real], node[real]
    return torch.zeros(len(points), dtype=torch.int64).index_add_(0, who, crossing(points[who], triangles[node]))
