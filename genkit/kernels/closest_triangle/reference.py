"""Every point against every triangle: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # pairs


def closest_triangle(points: Tensor, boxes: Tensor, triangles: Tensor, within: float) -> tuple[Tensor, Tensor]:
    """As `op.closest_triangle`, arguments checked."""
    parts = [
        squared_distance(some[:, None], triangles).min(1) for some in points.split(max(1, _AT_ONCE // len(triangles)))
    ]
    least = torch.cat([part.values for part in parts]) if parts else points.new_empty(0)
    number = torch.cat([part.indices for part in parts]) if parts else torch.empty(0, dtype=torch.int64)
    return torch.where(least <= within**2, least, torch.inf).sqrt(), number


def squared_distance(points: Tensor, triangles: Tensor) -> Tensor:
    """Squared distances of points [*, 3] to triangles [*, 3, 3]; infinite for a triangle at infinity."""
    # By coordinate: sums over an axis of three are slow.
    px, py, pz = points.unbind(-1)
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (corner.unbind(-1) for corner in triangles.unbind(-2))
    a, b, c = (px - ax, py - ay, pz - az), (px - bx, py - by, pz - bz), (px - cx, py - cy, pz - cz)
    ab, bc, ca = (bx - ax, by - ay, bz - az), (cx - bx, cy - by, cz - bz), (ax - cx, ay - cy, az - cz)
    border = torch.minimum(torch.minimum(_to_side(a, ab), _to_side(b, bc)), _to_side(c, ca))
    normal = _cross(ca, ab)
    size = _dot(normal, normal)
    # Signs say on which side of every edge the foot in the plane lies.
    within = (
        (_dot(_cross(ab, a), normal) >= 0) & (_dot(_cross(bc, b), normal) >= 0) & (_dot(_cross(ca, c), normal) >= 0)
    )
    plane = _dot(a, normal) ** 2 / size
    return torch.where(within & (size > 0), plane, border).nan_to_num_(nan=torch.inf)


_Vectors = tuple[Tensor, Tensor, Tensor]


def _dot(a: _Vectors, b: _Vectors) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: _Vectors, b: _Vectors) -> _Vectors:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _to_side(to: _Vectors, along: _Vectors) -> Tensor:
    share = (_dot(to, along) / _dot(along, along).clamp_min(1e-30)).clamp(0, 1)
    rest = (to[0] - share * along[0], to[1] - share * along[1], to[2] - share * along[2])
    return _dot(rest, rest)
