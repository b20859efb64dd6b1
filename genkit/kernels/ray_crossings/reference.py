"""Every point against every triangle: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # pairs


def ray_crossings(points: Tensor, boxes: Tensor, triangles: Tensor, slack: float) -> Tensor:
    """As `op.ray_crossings`, arguments checked."""
    F = len(triangles)
    parts = []
    for some in points.split(max(1, _AT_ONCE // max(1, F))):
        pairs = some.repeat_interleave(F, 0), triangles.repeat(len(some), 1, 1)
        parts.append(crossing(*pairs).view(len(some), F).sum(1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def crossing(points: Tensor, triangles: Tensor) -> Tensor:
    """1, 0 or -1: whether a ray from points [K, 3] up the last axis leaves or enters through triangles [K, 3, 3]."""
    around = torch.zeros(len(points), dtype=torch.int64)
    for i in range(3):
        a, b = triangles[:, i], triangles[:, (i + 1) % 3]
        # The end with the smaller second coordinate first, whichever triangle asks: both compute the same number.
        rises = b[:, 1] > a[:, 1]
        low, high = torch.where(rises[:, None], a, b), torch.where(rises[:, None], b, a)
        spans = (low[:, 1] <= points[:, 1]) & (points[:, 1] < high[:, 1])
        share = (points[:, 1] - low[:, 1]) / (high[:, 1] - low[:, 1])
        right = low[:, 0] + share * (high[:, 0] - low[:, 0]) > points[:, 0]
        around += (spans & right).long() * torch.where(rises, 1, -1)
    a, b, c = triangles.unbind(1)
    one, two, to = b - a, c - a, points - a
    area = one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]
    u = (to[:, 0] * two[:, 1] - to[:, 1] * two[:, 0]) / area
    v = (one[:, 0] * to[:, 1] - one[:, 1] * to[:, 0]) / area
    height = (a[:, 2] + u * one[:, 2] + v * two[:, 2]).nan_to_num(0)
    height = height.maximum(triangles[..., 2].amin(1)).minimum(triangles[..., 2].amax(1))
    return torch.where(height > points[:, 2], around, 0)
