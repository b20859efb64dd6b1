"""Line drawings of meshes: where the paper ends, where one part stands in front of another, and where the surface turns sharply."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from genkit.meshes.mesh import Mesh
from genkit.meshes.render import Camera, rasterise
from genkit.meshes.shading import soft_normals

_STEP = 0.04  # how far, in units of the mesh, a surface leaves the plane of its neighbour where a line is drawn
_SMOOTH = 40.0  # degrees below which faces count as one curved surface


def outlined(mesh: Mesh, camera: Camera, size: int, width: float = 1.5, crease: float = 35.0) -> Tensor:
    """The lines a person would draw, as ink: [size, size] in [0, 1], 0 = white paper.

    A line runs between two pixels of which one sees nothing or whose points lie off each other's tangent planes, and where normals a hundredth of the picture
    apart enclose more than `crease` degrees; looked for at twice the size.

    Args:
        width: of lines, in pixels of the result.
    """
    seen = rasterise(mesh, camera, 2 * size)
    points = seen.blend(mesh.vertices, mesh.faces)  # [Y, X, 3]
    normals = soft_normals(mesh, seen, _SMOOTH)
    least, gap = math.cos(math.radians(crease)), max(1, round(2 * size / 100))
    line = torch.zeros_like(seen.hit)
    for axis in (0, 1):
        (hit_a, hit_b), (point_a, point_b), (normal_a, normal_b) = (
            _pairs(x, axis, 1) for x in (seen.hit, points, normals)
        )
        apart = point_b - point_a
        off = torch.minimum((apart * normal_a).sum(-1).abs(), (apart * normal_b).sum(-1).abs())
        line.narrow(axis, 0, 2 * size - 1).logical_or_((hit_a != hit_b) | (hit_a & hit_b & (off > _STEP)))
        (hit_a, hit_b), (normal_a, normal_b) = (_pairs(x, axis, gap) for x in (seen.hit, normals))
        turned = hit_a & hit_b & ((normal_a * normal_b).sum(-1) < least)
        line.narrow(axis, gap // 2, 2 * size - gap).logical_or_(turned)
    thick = max(1, round(2 * width))
    ink = line[None, None].float()
    if thick > 1:
        ink = max_pool2d(torch.nn.functional.pad(ink, (thick // 2, (thick - 1) // 2) * 2), thick, 1)
    return avg_pool2d(ink, 2)[0, 0]


def _pairs(x: Tensor, axis: int, gap: int) -> tuple[Tensor, Tensor]:
    """What lies `gap` pixels apart along an axis of [Y, X, ...]."""
    length = x.shape[axis] - gap
    return x.narrow(axis, 0, length), x.narrow(axis, gap, length)
