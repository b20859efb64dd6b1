"""What lies on the nodes of an octree: padding, pooling, points, voxels, input features. Functions of (values [M, C], octree, depth)."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.octree.octree import Octree


def pad(x: Tensor, octree: Octree, depth: int, fill: float = 0.0) -> Tensor:
    """Values of the occupied nodes [., C] -> of all nodes [M_d, C]; empty ones get `fill`."""
    out = x.new_full((octree.count(depth), x.shape[1]), fill)
    return out.index_copy(0, octree.occupied(depth), x)


def max_pool(x: Tensor, octree: Octree, depth: int, is_dense: bool = True) -> Tensor:
    """The largest of 8 siblings, one depth up: [M_d, C] -> [M_(d-1), C], 0 at empty nodes. Not dense: occupied nodes to occupied nodes."""
    if not is_dense:
        return pad(x, octree, depth, -torch.inf).unflatten(0, (-1, 8)).amax(1)
    return pad(x.unflatten(0, (-1, 8)).amax(1), octree, depth - 1)


def average_pool(
    x: Tensor, octree: Octree, depth: int, kernel: str = "222", stride: int = 2, is_dense: bool = True
) -> Tensor:
    """Mean over the neighbourhood, of the nodes that are there; rows as in Octree.neighbours_of."""
    rows = octree.neighbours_of(depth, kernel, stride, is_dense)
    total = gather(x, rows).sum(1)
    return total / ((rows >= 0).sum(1, keepdim=True) + 1e-8)


def global_pool(x: Tensor, octree: Octree, depth: int, is_dense: bool = True) -> Tensor:
    """Mean over the nodes of each sample, [B, C]; 0 for a sample without nodes."""
    samples = octree.samples(depth) if is_dense else octree.samples(depth)[octree.occupied(depth)]
    count = torch.bincount(samples, minlength=octree.batch_size).clamp_min(1).to(x.dtype)
    return x.new_zeros(octree.batch_size, x.shape[1]).index_add(0, samples, x) / count[:, None]


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """x [M, C] at rows [..., K] -> [..., K, C], 0 where a row is -1."""
    beside = torch.cat([x, x.new_zeros(1, x.shape[1])])  # -1 is the last row
    return beside.index_select(0, torch.where(rows < 0, len(x), rows).flatten()).view(*rows.shape, x.shape[1])


def to_voxels(x: Tensor, octree: Octree, depth: int, is_dense: bool = True) -> Tensor:
    """[M_d, C] -> dense grids [B, X, Y, Z, C], 0 where there is no node."""
    xyz, samples = octree.xyz(depth), octree.samples(depth)
    if not is_dense:
        xyz, samples = xyz[octree.occupied(depth)], samples[octree.occupied(depth)]
    side = 1 << depth
    place = ((samples * side + xyz[:, 0]) * side + xyz[:, 1]) * side + xyz[:, 2]
    out = x.new_zeros(octree.batch_size * side**3, x.shape[1]).index_copy(0, place, x)
    return out.view(octree.batch_size, side, side, side, x.shape[1])


def from_voxels(grid: Tensor, octree: Octree, depth: int) -> Tensor:
    """Dense grids [B, X, Y, Z, C] -> the values of the nodes [M_d, C]."""
    x, y, z = octree.xyz(depth).unbind(1)
    return grid[octree.samples(depth), x, y, z]


def to_points(octree: Octree, is_scaled: bool = True) -> tuple[Tensor, Tensor]:
    """Points [P, 3] of the finest occupied nodes and their samples [P]: the mean of a node's points, or its centre where it was not built from points.

    Args:
        is_scaled: to [-1, 1]; else in units of a node.
    """
    occupied = octree.occupied(octree.depth)
    place = octree.points if octree.points is not None else octree.xyz(octree.depth)[occupied] + 0.5
    samples = octree.samples(octree.depth)[occupied]
    return (place * 2.0 ** (1 - octree.depth) - 1 if is_scaled else place), samples


def input_features(octree: Octree, kinds: str, is_dense: bool = True) -> Tensor:
    """What a network reads of the finest nodes of an octree built from points: [M, C], or of the occupied ones [P, C].

    Args:
        kinds: in this order whatever the order of the letters: N normal (3), D signed distance of the node's centre to the plane through its mean point
            (1, in node sides), L place of the mean point from the centre (3, in node sides), P the mean point in [-1, 1] (3), F the points' features.

    Raises: ValueError for an unknown letter, or one the octree has nothing for.
    """
    points, normals = octree.points, octree.normals
    local = None if points is None else points.frac() - 0.5
    found = {
        "N": normals,
        "D": None if local is None or normals is None else (local * normals).sum(1, keepdim=True),
        "L": local,
        "P": None if points is None else points * 2.0 ** (1 - octree.depth) - 1,
        "F": octree.features,
    }
    chosen = [found.get(kind) for kind in "NDLPF" if kind in kinds]
    given = [x for x in chosen if x is not None]
    if not kinds or len(given) != len(set(kinds)):
        lacking = [kind for kind in kinds if found.get(kind) is None]
        raise ValueError(f"input features {kinds!r}: {lacking} unknown or not in this octree; known are N, D, L, P, F")
    out = torch.cat(given, 1)
    return pad(out, octree, octree.depth) if is_dense else out
