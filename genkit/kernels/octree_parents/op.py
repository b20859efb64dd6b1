"""The nodes above some nodes of an octree, and the eight places below each of them: one depth of building it."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_parents = Operation("octree_parents")


def octree_parents(keys: Tensor, *, path: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(keys of the parents [A] int64, rising; keys of all their children [8 A]; children [8 A] int64: which of the given nodes each one is, or -1).

    Args:
        keys: [N] int64, rising without repetition, as octree_cells makes them: a place in the lower 48 bits, the sample above.
        path: see genkit.dispatch.

    Raises: ValueError for another shape or type; UsageError for a path that cannot run.
    """
    if keys.ndim != 1 or keys.dtype != torch.int64:
        raise ValueError(f"octree_parents: keys must be int64 [N], got {keys.dtype} {list(keys.shape)}")
    return _parents(path, keys)
