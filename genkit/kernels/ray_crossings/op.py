"""How often a ray up the last axis leaves a mesh, less how often it enters it: how often a closed mesh goes round the point where the ray begins."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_crossings = Operation("ray_crossings")


def ray_crossings(points: Tensor, boxes: Tensor, triangles: Tensor, slack: float, *, path: str | None = None) -> Tensor:
    """[N] int64.

    Every edge decides alike for both triangles at it, so that a ray through an edge or a corner counts once; only a point within rounding of the surface may
    come out on either side.

    Args:
        points: [N, 3] float64.
        boxes: [2^(d + 1) - 1, 6] float32 of a binary tree over the triangles, as `closest_triangle` has it; those of missing triangles hold nothing.
        triangles: [F, 3, 3] float64 in the order of the tree, 2^(d - 1) < F <= 2^d but for small trees.
        slack: by how much boxes are too small, because they were rounded.
        path: see genkit.dispatch.

    Not differentiable.

    Raises: ValueError for shapes that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype != torch.float64:
        raise ValueError(f"ray_crossings: points must be float64 [N, 3], got {points.dtype} {list(points.shape)}")
    if triangles.ndim != 3 or triangles.shape[1:] != (3, 3) or triangles.dtype != torch.float64:
        raise ValueError(
            f"ray_crossings: triangles must be float64 [F, 3, 3], got {triangles.dtype} {list(triangles.shape)}"
        )
    if boxes.ndim != 2 or boxes.shape[1] != 6 or boxes.dtype != torch.float32 or len(boxes) + 1 < 2 * len(triangles):
        raise ValueError(
            f"ray_crossings: boxes must be float32 [2^(d + 1) - 1, 6] over {len(triangles)} triangles, got {boxes.dtype} {list(boxes.shape)}"
        )
    return _crossings(path, points, boxes, triangles, float(slack))
