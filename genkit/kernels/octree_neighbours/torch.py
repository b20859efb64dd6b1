"""The middle 4x4x4 of the children around a node, made once, and the windows of its 8 children taken from them."""

from __future__ import annotations

import torch
from torch import Tensor


def octree_neighbours(parents: Tensor, children: Tensor) -> Tensor:
    """As `reference.octree_neighbours`."""
    # The first child of each node, and so far below zero where there is none that no child of it is above.
    first = torch.cat([children * 8, children.new_full((1,), -8)])
    first = first.index_select(0, torch.where(parents < 0, len(children), parents).flatten()).view(-1, 27)
    places = torch.cartesian_prod(*[torch.arange(1, 5, device=parents.device)] * 3)  # of 0 .. 5
    node = (places // 2 * torch.tensor([9, 3, 1], device=parents.device)).sum(1)
    child = (places % 2 * torch.tensor([4, 2, 1], device=parents.device)).sum(1)
    middle = first.index_select(1, node).add_(child).clamp_(min=-1).unflatten(1, (4, 4, 4))  # [P, 4, 4, 4]
    windows = middle.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # [P, 2, 2, 2, 3, 3, 3]
    return windows.reshape(-1, 27)
