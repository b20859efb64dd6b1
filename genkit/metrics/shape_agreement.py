"""How well one surface repeats another: distances, directions, shares within a tolerance, common volume."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.meshes.hierarchy import Hierarchy
from genkit.meshes.mesh import Mesh


def surface_agreement(
    points: Tensor, normals: Tensor, other: Tensor, other_normals: Tensor, tolerance: float = 0.02
) -> dict[str, float]:
    """Two surfaces by points drawn uniformly over each.

    Args:
        points, normals: [P, 3], of the true surface.
        other, other_normals: [R, 3].
        tolerance: in units of the points; 0.02 is a hundredth of the side of [-1, 1]^3.

    Returns:
        "chamfer": mean squared distance to the nearest point, both ways summed, as metrics.point_sets.chamfer.
        "normal_consistency": mean |cos| between the normals of nearest points, mean of both ways (Mescheder et al. 2019, "Occupancy Networks", section 4);
            1 is best.
        "f_score": harmonic mean of the shares of points of either surface that lie within the tolerance of the other (Knapitsch et al. 2017, eq. 5);
            1 is best.
    Raises: UsageError for an empty set.
    """
    if not len(points) or not len(other):
        raise UsageError(f"surfaces of {len(points)} and {len(other)} points cannot be compared")
    forth, nearest = _nearest(points, other)
    back, nearest_back = _nearest(other, points)
    consistency = (
        (normals * other_normals[nearest]).sum(1).abs().mean()
        + (other_normals * normals[nearest_back]).sum(1).abs().mean()
    ) / 2
    recall, precision = float((forth <= tolerance).float().mean()), float((back <= tolerance).float().mean())
    return {
        "chamfer": float(forth.square().mean() + back.square().mean()),
        "normal_consistency": float(consistency),
        "f_score": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    }


def iou(inside: Tensor, other: Tensor) -> float:
    """Common share of two solids, from which of the same places [N] bool lie inside each; 1 where both are empty."""
    union = (inside | other).sum()
    return float((inside & other).sum() / union) if union else 1.0


def _nearest(points: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of every point to the nearest of the other set, and which that is."""
    # A point is a triangle whose corners are one: the tree finds it without looking at all pairs.
    rows = torch.arange(len(other))[:, None].expand(-1, 3).contiguous()
    return Hierarchy(Mesh(other, rows)).closest(points)
