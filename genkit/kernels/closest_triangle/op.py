"""The triangle of a mesh that is nearest to each point, and how far it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.dispatch import Operation

_closest = Operation("closest_triangle")


def closest_triangle(
    points: Tensor, boxes: Tensor, triangles: Tensor, within: float = math.inf, *, path: str | None = None
) -> tuple[Tensor, Tensor]:
    """Distances [N] to the nearest triangle, infinite where it is more than `within`, and which it is [N] int64 (any there).

    Args:
        points: [N, 3] float32.
        boxes: [2^(d + 1) - 1, 6] float32, least and greatest coordinates of a binary tree over the triangles, level by level: children of box i are 2i + 1
            and 2i + 2, and the last 2^d hold one triangle each.
        triangles: [2^d, 3, 3] float32; infinite ones fill up.
        path: see genkit.dispatch.

    Not differentiable. Distances are exact but for rounding; of triangles at the same distance any may be named.

    Raises: ValueError for shapes that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    for name, value, width in (("points", points, 3), ("boxes", boxes, 6)):
        if value.ndim != 2 or value.shape[1] != width or value.dtype != torch.float32:
            raise ValueError(
                f"closest_triangle: {name} must be float32 [., {width}], got {value.dtype} {list(value.shape)}"
            )
    if triangles.ndim != 3 or triangles.shape[1:] != (3, 3) or triangles.dtype != torch.float32:
        raise ValueError(
            f"closest_triangle: triangles must be float32 [F, 3, 3], got {triangles.dtype} {list(triangles.shape)}"
        )
    F = len(triangles)
    if F < 1 or F & (F - 1) or len(boxes) != 2 * F - 1:
        raise ValueError(
            f"closest_triangle: {F} triangles and {len(boxes)} boxes; they must be a power of two and twice as many, less one"
        )
    return _closest(path, points, boxes, triangles, float(within))
