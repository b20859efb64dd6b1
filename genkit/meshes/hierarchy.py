"""Distances from points to a mesh, exact: a tree of boxes over its triangles that points go down."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.kernels.closest_triangle.op import closest_triangle
from genkit.kernels.ray_crossings.op import ray_crossings
from genkit.meshes.mesh import Mesh


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
        missing = (1 << (len(corners) - 1).bit_length()) - len(corners)
        # What is filled up with lies infinitely far away.
        self.triangles = torch.cat([corners[self.order], torch.full((missing, 3, 3), torch.inf)])
        low, high = self.triangles.amin(1), torch.where(self.triangles.isinf(), -torch.inf, self.triangles).amax(1)
        levels = [torch.cat([low, high], 1)]
        while len(low) > 1:
            low, high = low.reshape(-1, 2, 3).amin(1), high.reshape(-1, 2, 3).amax(1)
            levels.insert(0, torch.cat([low, high], 1))
        self.boxes = torch.cat(levels)  # level by level, least and greatest coordinates

    def closest(self, points: Tensor, within: float = torch.inf) -> tuple[Tensor, Tensor]:
        """[N, 3] -> distance to the surface [N], and the face it is reached at [N] int64; infinite, and any face, where it is more than `within`."""
        distance, leaf = closest_triangle(points, self.boxes, self.triangles, within)
        return distance, self.order[leaf.clamp_max(len(self.order) - 1)]


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
        corners = mesh.corners.double() @ self._TURN  # [F, 3, 3]; rays go up the last axis
        tree = Hierarchy(Mesh((mesh.vertices.double() @ self._TURN).float(), mesh.faces))
        self._triangles, self._boxes = corners[tree.order], tree.boxes
        # Boxes were made of rounded corners.
        side = float((corners.amax((0, 1)) - corners.amin((0, 1))).max())
        self._slack = 1e-6 * side + 1e-6 * float(corners.abs().max())

    def __call__(self, points: Tensor) -> Tensor:
        """[N, 3] -> [N] int64."""
        return ray_crossings(points.double() @ self._TURN, self._boxes, self._triangles, self._slack)


def signed_distance(mesh: Mesh, points: Tensor) -> Tensor:
    """Distance to the surface, negative inside: [N, 3] -> [N]. Inside is what the mesh goes round, overlaps included; it must be watertight."""
    distance, _ = Hierarchy(mesh).closest(points)
    return torch.where(Winding(mesh)(points) != 0, -distance, distance)


def _spread(cell: Tensor) -> Tensor:
    """Morton codes of cells [F, 3] below 1024."""
    code = torch.zeros(len(cell), dtype=torch.int64)
    for bit in range(10):
        for axis in range(3):
            code |= (cell[:, axis] >> bit & 1) << (3 * bit + axis)
    return code
