"""A parent's key drops the last three bits of the place: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

_PLACE = (1 << 48) - 1


def octree_parents(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `op.octree_parents`, arguments checked."""
    above, number = torch.unique((keys & _PLACE) >> 3 | keys & ~_PLACE, return_inverse=True)
    eight = torch.arange(8, device=keys.device)
    below = (((above & _PLACE) << 3 | above & ~_PLACE)[:, None] + eight).flatten()
    children = torch.full_like(below, -1)
    children[8 * number + (keys & 7)] = torch.arange(len(keys), device=keys.device)
    return above, below, children
