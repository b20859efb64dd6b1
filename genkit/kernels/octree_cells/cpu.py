"""The compiled path of octree_cells; see cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit import native


def refuses(points: Tensor, samples: Tensor | None, depth: int) -> str | None:
    """Why these arguments need another path."""
    if points.device.type != "cpu":
        return f"it works in main memory, the points are on {points.device}"
    return None if points.dtype == torch.float32 else f"it reads float32, these are {points.dtype}"


def octree_cells(points: Tensor, samples: Tensor | None, depth: int) -> tuple[Tensor, Tensor]:
    """As `reference.octree_cells`."""
    P = len(points)
    keys, number = torch.empty(P, dtype=torch.int64), torch.empty(P, dtype=torch.int64)
    scratch, count = torch.empty(4 * P, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    own = None if samples is None else samples.contiguous()
    call = native.function("octree_cells", "octree_cells", "ppppppii")
    call(points.contiguous(), own, keys, number, scratch, count, P, depth)
    return keys[: int(count)], number
