"""Every point's key, and each key once: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def octree_cells(points: Tensor, samples: Tensor | None, depth: int) -> tuple[Tensor, Tensor]:
    """As `op.octree_cells`, arguments checked."""
    # (x + 1) rounds to 2 for the last numbers below 1.
    place = ((points + 1) * 2.0 ** (depth - 1)).long().clamp(0, (1 << depth) - 1)
    key = torch.zeros_like(place[:, 0]) if samples is None else samples << 48
    for bit in range(depth):
        for axis in range(3):
            key |= (place[:, axis] >> bit & 1) << (3 * bit + 2 - axis)
    return torch.unique(key, return_inverse=True)
