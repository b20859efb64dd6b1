"""An octree as a sequence: one split bit per node, depth after depth, then a binary code per node of the last depth.

Wei et al., "OctGPT: Octree-based Multiscale Autoregressive Models for 3D Shape Generation", 2025, section 3.2. Tokens stand depth by depth, and within a
depth as the nodes do: by sample, then in z-order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.octree.build import complete, split
from genkit.octree.octree import Octree


@dataclass
class OctreeTokens:
    """The tokens of a batch of shapes.

    Attributes:
        octree: down to the depth of the codes.
        splits: [S] int64 of 0 and 1, whether a node is split, for the depths full_depth .. octree.depth - 1.
        codes: [M, bits] int64 of 0 and 1, of the nodes of octree.depth.
    """

    octree: Octree
    splits: Tensor
    codes: Tensor

    @property
    def batch_size(self) -> int:
        return self.octree.batch_size

    @property
    def samples(self) -> Tensor:
        """[S + M] int64, the sample of every token."""
        return samples_of(self.octree)

    def __len__(self) -> int:
        return self.batch_size

    def to(self, device: torch.device | str, non_blocking: bool = False) -> OctreeTokens:
        return OctreeTokens(self.octree.to(device), self.splits.to(device), self.codes.to(device))


def splits_of(octree: Octree, depth: int | None = None) -> Tensor:
    """[S] int64: which nodes of the depths full_depth .. depth - 1 are split; depth None = the octree's own."""
    last = octree.depth if depth is None else depth
    parts = [octree.is_occupied(d) for d in range(octree.full_depth, last)]
    return torch.cat(parts).long() if parts else octree.keys[0].new_zeros(0)


def samples_of(octree: Octree) -> Tensor:
    """[T] int64: the sample of every node of the depths full_depth .. depth."""
    return torch.cat([octree.samples(d) for d in range(octree.full_depth, octree.depth + 1)])


def grow(splits: Tensor, *, full_depth: int, depth: int, batch_size: int) -> Octree:
    """The octree whose split bits these are: the inverse of `splits_of`.

    Raises: ValueError when there are too few or too many bits.
    """
    octree = complete(full_depth, batch_size=batch_size, device=splits.device)
    at = 0
    for d in range(full_depth, depth):
        bits = splits[at : at + octree.count(d)]
        at += octree.count(d)
        if at > len(splits):
            raise ValueError(f"{len(splits)} split bits end within depth {d}, whose nodes need {at}")
        octree = split(octree, bits.bool())
    if at != len(splits):
        raise ValueError(f"{len(splits)} split bits, but the depths {full_depth}..{depth - 1} have {at} nodes")
    return octree
