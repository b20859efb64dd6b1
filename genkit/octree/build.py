"""Making octrees: from points, complete grids, from several, and by growing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from genkit.kernels.octree_cells.op import octree_cells
from genkit.kernels.octree_parents.op import octree_parents
from genkit.kernels.scatter_sum.op import scatter_sum
from genkit.octree import keys as zorder
from genkit.octree.octree import Octree


def from_points(
    points: Tensor,
    *,
    depth: int,
    full_depth: int = 2,
    normals: Tensor | None = None,
    features: Tensor | None = None,
    samples: Tensor | None = None,
    batch_size: int = 1,
) -> Octree:
    """The octrees whose finest nodes hold points.

    Args:
        points: [P, 3] in [-1, 1), of all samples.
        depth: of the finest nodes, side 2 / 2^depth.
        full_depth: complete down to it.
        normals: [P, 3]; averaged in a node and brought to length 1.
        features: [P, C]; averaged.
        samples: [P] int64, the sample a point belongs to; None = sample 0.
        batch_size: B; a sample without points has a complete grid of empty nodes and nothing below.

    Raises: ValueError for points outside the box or not finite, and for sizes that do not fit.
    """
    _check(depth, full_depth, batch_size)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be [P, 3], got {list(points.shape)}")
    for name, given in (("normals", normals), ("features", features), ("samples", samples)):
        if given is not None and len(given) != len(points):
            raise ValueError(f"{len(given)} {name} for {len(points)} points")
    least, greatest = points.aminmax() if len(points) else (0.0, 0.0)
    if not (least >= -1 and greatest < 1):  # also false for not-a-number
        reason = "are not finite" if not points.isfinite().all() else "reach outside [-1, 1)"
        raise ValueError(f"the points {reason}; scale them into the box first, with a margin")
    node, number = octree_cells(points, samples, depth)  # occupied nodes, and which one a point is in
    each = 1 / torch.bincount(number, minlength=len(node)).to(points.dtype)[:, None]

    def total(values: Tensor) -> Tensor:
        return scatter_sum(values, number, len(node))

    octree = complete(full_depth, batch_size=batch_size, device=points.device)
    octree.depth = depth
    octree.points = (total(points) * each + 1) * 2.0 ** (depth - 1)  # in [0, 2^depth)
    octree.normals = None if normals is None else normalize(total(normals))
    octree.features = None if features is None else total(features) * each
    levels: list[tuple[Tensor, Tensor]] = []
    for _ in range(depth, full_depth, -1):
        node, key, children = octree_parents(node)
        levels.append((key, children))
    children = torch.full_like(octree.children[full_depth], -1)
    inside = (zorder.sample(node) << 3 * full_depth) + zorder.place(node)
    octree.children[full_depth] = children.index_copy_(0, inside, torch.arange(len(node), device=points.device))
    for key, children in reversed(levels):
        octree.keys.append(key)
        octree.children.append(children)
    return octree


def complete(depth: int, *, batch_size: int = 1, device: torch.device | str = "cpu") -> Octree:
    """Complete grids down to `depth`, every node occupied."""
    _check(depth, depth, batch_size)
    sample = torch.arange(batch_size, device=device)[:, None] << zorder.BATCH_SHIFT
    keys = [(torch.arange(8**d, device=device) | sample).flatten() for d in range(depth + 1)]
    return Octree(depth, depth, batch_size, keys, [torch.arange(len(key), device=device) for key in keys])


def split(octree: Octree, is_split: Tensor) -> Octree:
    """The octree one depth deeper, where the nodes of its finest depth that are marked [M] bool have 8 children, all of them occupied.

    Where nothing is marked there would be no further depth; as in the official code the first node is split then. The given octree is not changed.

    Raises: ValueError for a wrong number of marks, or at the deepest depth there can be.
    """
    d = octree.depth
    if is_split.shape != (octree.count(d),):
        raise ValueError(f"{octree.count(d)} nodes of depth {d} need a mark each, got {list(is_split.shape)}")
    _check(d + 1, octree.full_depth, octree.batch_size)
    octree = mark(octree, is_split)
    below = zorder.first_child(octree.keys[d][octree.occupied(d)])
    key = (below[:, None] + torch.arange(8, device=octree.device)).flatten()
    return replace(
        octree,
        depth=d + 1,
        keys=[*octree.keys, key],
        children=[*octree.children, torch.arange(len(key), device=key.device)],
    )


def at_least_one(octree: Octree, is_split: Tensor) -> Tensor:
    """The marks [M] bool of the finest depth, with the first node of every sample that has nodes there and no mark. What a sample becomes then does not
    depend on the others."""
    d = octree.depth
    some = torch.bincount(octree.samples(d)[is_split], minlength=octree.batch_size)
    count = octree.counts_of_samples(d)
    return is_split.index_fill(0, (count.cumsum(0) - count)[(some == 0) & (count > 0)], True)


def mark(octree: Octree, is_split: Tensor) -> Octree:
    """The octree with other occupied nodes [M] bool at its finest depth; see `split` for the case of none."""
    d = octree.depth
    is_split = is_split.bool()
    number = is_split.long().cumsum(0)
    if not int(number[-1]):
        is_split = torch.arange(len(is_split), device=is_split.device) == 0
        number = torch.ones_like(number)
    children = torch.where(is_split, number - 1, -1)
    kept = {name: value for name, value in octree._kept.items() if name != ("occupied", d)}
    return replace(
        octree, children=[*octree.children[:d], children], points=None, normals=None, features=None, _kept=kept
    )


def until(octree: Octree, depth: int) -> Octree:
    """The octree cut off below `depth`. What is split there stays marked as occupied."""
    if not octree.full_depth <= depth <= octree.depth:
        raise ValueError(f"depth {depth} is not in {octree.full_depth}..{octree.depth}")
    if depth == octree.depth:
        return octree
    kept = {name: value for name, value in octree._kept.items() if name[1] <= depth}
    return Octree(
        depth,
        octree.full_depth,
        octree.batch_size,
        octree.keys[: depth + 1],
        octree.children[: depth + 1],
        _kept=kept,
    )


def merge(octrees: Sequence[Octree]) -> Octree:
    """Several octrees, each of one or more samples, as one batch. Raises ValueError for none, or for different depths."""
    if not octrees:
        raise ValueError("there is no octree to merge")
    first = octrees[0]
    if any((o.depth, o.full_depth) != (first.depth, first.full_depth) for o in octrees):
        found = ", ".join(f"{o.depth}/{o.full_depth}" for o in octrees)
        raise ValueError(f"octrees of different depth/full_depth cannot be merged: {found}")
    keys: list[Tensor] = []
    children: list[Tensor] = []
    for d in range(first.depth + 1):
        before, sample = 0, 0
        key, child = [], []
        for o in octrees:
            key.append(o.keys[d] + (sample << zorder.BATCH_SHIFT))
            child.append(torch.where(o.children[d] >= 0, o.children[d] + before, -1))
            before += o.count_occupied(d)
            sample += o.batch_size
        keys.append(torch.cat(key))
        children.append(torch.cat(child))
    merged = Octree(first.depth, first.full_depth, sum(o.batch_size for o in octrees), keys, children)
    for name in ("points", "normals", "features"):
        own = [getattr(o, name) for o in octrees]
        if all(x is not None for x in own):
            setattr(merged, name, torch.cat(own))
    return merged


def _check(depth: int, full_depth: int, batch_size: int) -> None:
    if not 0 <= full_depth <= depth <= zorder.MAX_DEPTH:
        raise ValueError(f"full_depth {full_depth} and depth {depth} must rise within 0..{zorder.MAX_DEPTH}")
    if not 1 <= batch_size <= zorder.MAX_BATCH:
        raise ValueError(f"batch_size {batch_size} must be in 1..{zorder.MAX_BATCH}")
