"""Distances from points to a mesh, exact and without a loop over points or triangles: a tree of boxes that all points go down together."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.meshes.mesh import Mesh

_POINTS = 1 << 13  # looked at together
_FIRST = 3  # level, of 8 boxes, that a search begins at


class Hierarchy:
    """A binary tree of boxes over the triangles of a mesh, in the order of a space-filling curve; the boxes of the last level hold one triangle each.

    Args:
        mesh: with faces.
    """

    def __init__(self, mesh: Mesh) -> None:
        corners = mesh.corners
        middle = corners.mean(1)
        least, greatest = corners.amin((0, 1)), corners.amax((0, 1))
        cell = ((middle - least) / (greatest - least).clamp_min(1e-30) * 1023).long().clamp(0, 1023)
        self.order = _spread(cell).argsort()  # [F]
        self.depth = max(_FIRST, (len(corners) - 1).bit_length())
        missing = (1 << self.depth) - len(corners)
        # What is filled up with lies infinitely far away.
        self.triangles = torch.cat([corners[self.order], torch.full((missing, 3, 3), torch.inf)])
        low, high = self.triangles.amin(1), torch.where(self.triangles.isinf(), -torch.inf, self.triangles).amax(1)
        point = self.triangles[:, 0]
        self.boxes: list[Tensor] = []  # level -> [2^level, 6], least and greatest coordinates
        self.points: list[Tensor] = []  # level -> [2^level, 3], a corner of one of the triangles in each box
        for _ in range(self.depth + 1):
            self.boxes.insert(0, torch.cat([low, high], 1))
            self.points.insert(0, point)
            low, high = (
                (pair.reshape(-1, 2, 3) for pair in (low, high)) if len(low) > 1 else (low[:, None], high[:, None])
            )
            low, high = low.amin(1), high.amax(1)
            point = point[::2]

    def closest(self, points: Tensor, within: float = torch.inf) -> tuple[Tensor, Tensor]:
        """[N, 3] -> distance to the surface [N], and the face it is reached at [N] int64; infinite, and any face, where it is more than `within`."""
        parts = [self._closest(some, within) for some in points.split(_POINTS)]
        return torch.cat([d for d, _ in parts]), self.order[torch.cat([face for _, face in parts])]

    def _closest(self, points: Tensor, within: float) -> tuple[Tensor, Tensor]:
        best = torch.full((len(points),), within**2)
        who, node = torch.arange(len(points)).repeat_interleave(8), torch.arange(8).repeat(len(points))
        place = points[who]
        for level in range(_FIRST, self.depth + 1):
            if level > _FIRST:
                who, node = who.repeat_interleave(2), torch.stack([2 * node, 2 * node + 1], 1).reshape(-1)
                place = points[who]
            # No farther than any corner seen so far: what has a box beyond that is dropped, with all below it.
            near = _squared(place - self.points[level][node])
            best = best.scatter_reduce(0, who, near, "amin")
            low, high = self.boxes[level][node].split(3, 1)
            kept = _squared((low - place).maximum(place - high).clamp_min_(0)) <= best[who]
            who, node, place = who[kept], node[kept], place[kept]
        squared = squared_distance(place, self.triangles[node])
        squared = torch.where(squared <= within**2, squared, torch.inf)
        least = torch.full_like(best, torch.inf).scatter_reduce(0, who, squared, "amin")
        wins = squared == least[who]
        face = torch.zeros(len(points), dtype=torch.int64).scatter(0, who[wins], node[wins])
        return least.sqrt(), face


class Winding:
    """How often a closed mesh goes round a point: 0 outside, 1 inside, 2 where two of its parts overlap.

    Counted along a ray in double precision. Every edge decides alike for both triangles at it, so that a ray through an edge or a corner counts
    once; only a point within rounding of the surface may come out on either side. A mesh with holes has no inside: the result then depends on the ray.
    """

    # Any turn that no modelled surface is parallel to: columns of a random rotation, so that rays do not run within faces.
    _TURN = torch.linalg.qr(
        torch.tensor(
            [[0.7391, 0.4137, -0.2911], [-0.1923, 0.8713, 0.5017], [0.6133, -0.2719, 0.9241]], dtype=torch.float64
        )
    ).Q

    def __init__(self, mesh: Mesh) -> None:
        self._corners = mesh.corners.double() @ self._TURN  # [F, 3, 3]; rays go up the last axis
        self._tree = Hierarchy(Mesh((mesh.vertices.double() @ self._TURN).float(), mesh.faces))
        # Boxes were made of rounded corners.
        side = float((self._corners.amax((0, 1)) - self._corners.amin((0, 1))).max())
        self._slack = 1e-6 * side + 1e-6 * float(self._corners.abs().max())

    def __call__(self, points: Tensor) -> Tensor:
        """[N, 3] -> [N] int64."""
        return torch.cat([self._count(some.double() @ self._TURN) for some in points.split(_POINTS)])

    def _count(self, points: Tensor) -> Tensor:
        who = torch.arange(len(points)).repeat_interleave(8)
        node = torch.arange(8).repeat(len(points))
        rough = points.float()
        for level in range(_FIRST, self._tree.depth + 1):
            if level > _FIRST:
                who, node = who.repeat_interleave(2), torch.stack([2 * node, 2 * node + 1], 1).reshape(-1)
            low, high = self._tree.boxes[level][node].split(3, 1)
            place = rough[who]
            under = (place <= high + self._slack).all(1) & (place[:, :2] >= low[:, :2] - self._slack).all(1)
            who, node = who[under], node[under]
        real = node < len(self._tree.order)
        who, node = who[real], node[real]
        crossing = _crossing(points[who], self._corners[self._tree.order[node]])
        return torch.zeros(len(points), dtype=torch.int64).index_add_(0, who, crossing)


def _crossing(points: Tensor, triangles: Tensor) -> Tensor:
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


def signed_distance(mesh: Mesh, points: Tensor) -> Tensor:
    """Distance to the surface, negative inside: [N, 3] -> [N]. Inside is what the mesh goes round, overlaps included; it must be watertight."""
    distance, _ = Hierarchy(mesh).closest(points)
    return torch.where(Winding(mesh)(points) != 0, -distance, distance)


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


def _squared(vectors: Tensor) -> Tensor:
    x, y, z = vectors.unbind(1)
    return x * x + y * y + z * z


def _spread(cell: Tensor) -> Tensor:
    """Morton codes of cells [F, 3] below 1024."""
    code = torch.zeros(len(cell), dtype=torch.int64)
    for bit in range(10):
        for axis in range(3):
            code |= (cell[:, axis] >> bit & 1) << (3 * bit + axis)
    return code
