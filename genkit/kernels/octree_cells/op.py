"""The cells of a grid that hold points, in z-order: the first step of building an octree."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_cells = Operation("octree_cells")


def octree_cells(
    points: Tensor, samples: Tensor | None, depth: int, *, path: str | None = None
) -> tuple[Tensor, Tensor]:
    """(keys [N] int64 of the occupied cells, rising; number [P] int64 of the cell that each point lies in).

    Args:
        points: [P, 3] in [-1, 1), float32 or float64; 2^depth cells along each axis.
        samples: [P] int64 in [0, 2^15), in the bits of a key from 48 on; None = 0 for all.
        depth: 0 to 16.
        path: see genkit.dispatch.

    Bits of a key: z lowest, then y, then x, interleaved. Not differentiable.

    Raises: ValueError for shapes and depths that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(f"octree_cells: points must be [P, 3] floats, got {points.dtype} {list(points.shape)}")
    if samples is not None and (samples.shape != points.shape[:1] or samples.dtype != torch.int64):
        raise ValueError(
            f"octree_cells: samples must be int64 [{len(points)}], got {samples.dtype} {list(samples.shape)}"
        )
    if not 0 <= depth <= 16:
        raise ValueError(f"octree_cells: depth {depth} must be in 0..16")
    return _cells(path, points.detach(), samples, depth)
