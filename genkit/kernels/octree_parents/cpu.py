"""The compiled path of octree_parents; see cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit import native


def refuses(keys: Tensor) -> str | None:
    """Why these arguments need another path."""
    return None if keys.device.type == "cpu" else f"it works in main memory, the keys are on {keys.device}"


def octree_parents(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.octree_parents`."""
    N = len(keys)
    keys = keys.contiguous()
    above, count = torch.empty(N, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    native.function("octree_parents", "octree_above", "pppi")(keys, above, count, N)
    A = int(count)
    below, children = torch.empty(8 * A, dtype=torch.int64), torch.empty(8 * A, dtype=torch.int64)
    native.function("octree_parents", "octree_below", "ppppii")(keys, above, below, children, N, A)
    return above[:A], below, children
