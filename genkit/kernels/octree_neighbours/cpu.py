"""The compiled path of octree_neighbours; see cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit import native


def refuses(parents: Tensor, children: Tensor) -> str | None:
    """Why these arguments need another path."""
    return None if parents.device.type == "cpu" else f"it works in main memory, the nodes are on {parents.device}"


def octree_neighbours(parents: Tensor, children: Tensor) -> Tensor:
    """As `reference.octree_neighbours`."""
    out = torch.empty(8 * len(parents), 27, dtype=torch.int64)
    call = native.function("octree_neighbours", "octree_neighbours", "pppi")
    call(parents.contiguous(), children.contiguous(), out, len(parents))
    return out
