"""All points go down the tree together, level by level, and leave what is too far behind."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.kernels.closest_triangle.reference import squared_distance

_POINTS = 1 << 13  # looked at together
_FIRST = 3  # level, of 8 boxes, that a search begins at


def closest_triangle(points: Tensor, boxes: Tensor, triangles: Tensor, within: float) -> tuple[Tensor, Tensor]:
    """As `reference.closest_triangle`."""
    parts = [_closest(some, boxes, triangles, within) for some in points.split(_POINTS)]
    return torch.cat([d for d, _ in parts]), torch.cat([number for _, number in parts])


def _closest(points: Tensor, boxes: Tensor, triangles: Tensor, within: float) -> tuple[Tensor, Tensor]:
    depth = len(triangles).bit_length() - 1
    first = min(_FIRST, depth)
    best = torch.full((len(points),), within**2)
    who = torch.arange(len(points)).repeat_interleave(1 << first)
    node = torch.arange(1 << first).repeat(len(points))
    place = points[who]
    for level in range(first, depth + 1):
        if level > first:
            who, node = who.repeat_interleave(2), torch.stack([2 * node, 2 * node + 1], 1).reshape(-1)
            place = points[who]
        # No farther than any corner seen so far: what has a box beyond that is dropped, with all below it.
        near = _squared(place - triangles[node << depth - level, 0])
        best = best.scatter_reduce(0, who, near, "amin")
        low, high = boxes[node + (1 << level) - 1].split(3, 1)
        kept = _squared((low - place).maximum(place - high).clamp_min_(0)) <= best[who]
        who, node, place = who[kept], node[kept], place[kept]
    squared = squared_distance(place, triangles[node])
    squared = torch.where(squared <= within**2, squared, torch.inf)
    least = torch.full_like(best, torch.inf).scatter_reduce(0, who, squared, "amin")
    wins = squared == least[who]
    number = torch.zeros(len(points), dtype=torch.int64).scatter(0, who[wins], node[wins])
    return least.sqrt(), number


def _squared(vectors: Tensor) -> Tensor:
    x, y, z = vectors.unbind(1)
    return x * x + y * y + z * z
