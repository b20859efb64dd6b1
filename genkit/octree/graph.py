"""The dual graph of an octree: its leaves and the nodes of one depth as vertices, an edge where two of them share a face.

Wang et al., "Dual Octree Graph Networks for Learning Adaptive Volumetric Shape Representations", 2022; vertex order and edge directions as in
`octree-nn/ognn-pytorch ognn/octreed.py` (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.octree.octree import Octree

# Directions of a face: +z, -z, +y, -y, +x, -x; a direction's opposite is its number with the last bit turned.
DIRECTIONS = 6
EDGES = DIRECTIONS + 1  # and itself
# Of a node's 3x3x3 neighbourhood, dz fastest.
_FACES = (14, 12, 16, 10, 22, 4)


@dataclass(frozen=True)
class DualGraph:
    """Vertices: the leaves of every depth from full_depth to depth - 1, then all nodes of `depth`.

    Attributes:
        depth: the deepest one.
        samples: [N] int64.
        depths: [N] int64, from full_depth on.
        rows: [N * 7] int64: of every vertex the neighbour across each of its six faces where there is exactly one, else N, and then itself.
        many: [2, E] int64: (vertex * 7 + direction, neighbour) of faces that several finer vertices share.
        share: [E, 1] float, one divided by the number of neighbours across that face.
        coarse: [K] int64, places in `rows` of faces whose one neighbour is larger and shares its own face with others.
        share_of_coarse: [K, 1] float, one divided by the number of neighbours it has there.
        is_vertex: [T] bool: which of all nodes of the depths full_depth .. depth are vertices.
    """

    depth: int
    batch_size: int
    samples: Tensor
    depths: Tensor
    rows: Tensor
    many: Tensor
    share: Tensor
    coarse: Tensor
    share_of_coarse: Tensor
    is_vertex: Tensor
    num_leaves: int  # vertices above `depth`; the nodes of `depth` come behind them

    def __len__(self) -> int:
        return len(self.samples)


def dual_graph(octree: Octree, depth: int) -> DualGraph:
    """The graph of an octree cut off at `depth`.

    Every vertex looks across its faces for the node of its own size or, where there is none, the leaf that covers that place: an edge, and another one back
    where the leaf is larger. Nodes of the same size see each other; so all edges are found.
    """
    first = octree.full_depth
    is_leaf = [~octree.is_occupied(d) for d in range(first, depth)]
    is_leaf.append(torch.ones(octree.count(depth), dtype=torch.bool, device=octree.device))
    flat = torch.cat(is_leaf)
    number = torch.where(flat, flat.long().cumsum(0) - 1, -1)  # of each node as a vertex
    start = [0]
    for d in range(first, depth + 1):
        start.append(start[-1] + octree.count(d))
    vertex = [number[start[i] : start[i + 1]] for i in range(len(is_leaf))]

    # cover: for every node of a depth and each face, the leaf of a shallower depth behind it, or -1.
    cover = torch.full((octree.count(first), DIRECTIONS), -1, dtype=torch.int64, device=octree.device)
    sources, directions, targets = [], [], []
    back: list[tuple[Tensor, Tensor, Tensor]] = []
    faces = torch.tensor(_FACES, device=octree.device)
    for i, d in enumerate(range(first, depth + 1)):
        beside = octree.neighbours(d).index_select(1, faces)  # [M, 6], of the same size
        if i:
            above = octree.occupied(d - 1)
            up = octree.neighbours(d - 1).index_select(0, above).index_select(1, faces)  # of the parents
            is_cut = (up >= 0) & (vertex[i - 1][up.clamp_min(0)] >= 0)
            of_parents = torch.where(is_cut, vertex[i - 1][up.clamp_min(0)], cover.index_select(0, above))
            cover = of_parents.repeat_interleave(8, 0)
            cover = torch.where(beside >= 0, -1, cover)
        own = vertex[i][:, None].expand(-1, DIRECTIONS)
        same = torch.where(beside >= 0, vertex[i][beside.clamp_min(0)], -1)
        for found, is_larger in ((same, False), (cover, True)):
            node, face = ((own >= 0) & (found >= 0)).nonzero(as_tuple=True)
            sources.append(own[node, face])
            directions.append(face)
            targets.append(found[node, face])
            if is_larger:
                back.append((found[node, face], face ^ 1, own[node, face]))
    for a, face, b in back:
        sources.append(a)
        directions.append(face)
        targets.append(b)
    source, direction, target = torch.cat(sources), torch.cat(directions), torch.cat(targets)
    slot, total = source * EDGES + direction, int(flat.sum())
    count = torch.bincount(slot, minlength=total * EDGES)
    is_single = count.index_select(0, slot) == 1
    rows = torch.full((total * EDGES,), total, dtype=torch.int64, device=octree.device)
    rows[slot[is_single]] = target[is_single]
    rows[DIRECTIONS::EDGES] = torch.arange(total, device=octree.device)
    shared = count.index_select(0, target * EDGES + (direction ^ 1))  # neighbours on the other side of the same face
    several = (~is_single).nonzero().squeeze(1)
    coarse = (shared > 1).nonzero().squeeze(1)
    all_depths = torch.cat([torch.full_like(octree.keys[d], d - first) for d in range(first, depth + 1)])
    all_samples = torch.cat([octree.samples(d) for d in range(first, depth + 1)])
    return DualGraph(
        depth,
        octree.batch_size,
        all_samples[flat],
        all_depths[flat],
        rows,
        torch.stack([slot, target]).index_select(1, several),
        1 / count[slot[several], None].float(),
        slot[coarse],
        1 / shared[coarse, None].float(),
        flat,
        total - octree.count(depth),
    )
