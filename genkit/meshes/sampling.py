"""Points on a mesh, uniformly over its area."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.meshes.mesh import Mesh
from genkit.rng import Rng


def sample_surface(mesh: Mesh, count: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """Points drawn uniformly over the surface, with the normals of their faces.

    Args:
        rng: one stream (a batch of one).

    Returns: points [count, 3], normals [count, 3] of length 1, and the faces they lie on [count] int64. Raises ValueError for a mesh without area.
    """
    cumulative = mesh.areas.double().cumsum(0)
    if not len(cumulative) or not float(cumulative[-1]) > 0:
        raise ValueError("a mesh without area has no points to draw")
    u, v, w = rng.fork("surface").uniform(3, count)[0].unbind(0)  # [count] each
    # Strata keep the number of points per area nearly fixed; a draw of independent places would leave gaps.
    place = (torch.arange(count) + u.double()) / count * cumulative[-1]
    face = torch.searchsorted(cumulative, place, right=True).clamp_max_(len(cumulative) - 1)
    root = v.sqrt()  # uniform over a triangle: Osada et al. 2002, eq. 1
    weights = torch.stack([1 - root, root * (1 - w), root * w], 1)  # [count, 3]
    points = (mesh.corners[face] * weights[..., None]).sum(1)
    # Faces stand in the order of the file; points must not, or a prefix of them would be one part of the shape.
    order = rng.fork("order").order(count)[0]
    return points[order], mesh.normals[face[order]], face[order]
