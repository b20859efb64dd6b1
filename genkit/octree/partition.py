"""A continuous function from values on octree nodes: multi-level partition of unity (Ohtake et al., 2003; neural: Wang et al., "Dual Octree Graph
Networks", 2022, section 3.2; `octree-nn/ognn-pytorch ognn/mpu.py`).

Every node k holds a linear function g_k . (x - centre) + o_k. Around x, in every depth, the eight nodes whose centres surround it are blended with
trilinear weights: leaves only above the deepest depth, all nodes in it; deeper nodes weigh more, by depth^2 / 50.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.kernels.scatter_sum.op import scatter_sum
from genkit.octree.octree import Octree

_MARGIN = 2  # of places where no nodes are, for both corners of what lies outside
_SMALL = 1e-8  # of the sum of weights: far from every leaf the function is 0


@dataclass(frozen=True)
class Around:
    """Which nodes blend at each of `count` queries, for one deepest depth.

    Attributes:
        query: [K] int64.
        node: [K] int64 among all nodes of the depths full_depth .. depth.
        weight: [K], and slope [K, 3], its gradient at the query.
        offset: [K, 3] of the query from the centre of the node, in world units.
    """

    query: Tensor
    node: Tensor
    weight: Tensor
    slope: Tensor
    offset: Tensor
    count: int


def around(octree: Octree, points: Tensor, samples: Tensor, depths: range) -> dict[int, Around]:
    """Who blends at points [P, 3] in [-1, 1] of samples [P] int64, for each deepest depth of `depths`."""
    corner = torch.cartesian_prod(*[torch.arange(2, device=points.device)] * 3)  # [8, 3]
    parts: list[tuple[Tensor, ...]] = []
    start = 0
    found = {}
    for d in range(octree.full_depth, depths.stop):
        scale = 2.0**d
        place = (points + 1) * (scale / 2) - 0.5  # [P, 3], centres are whole
        low = place.floor()
        number = _numbers(octree, low, corner, samples, d)  # [P * 8]
        here = (number >= 0).nonzero().squeeze(1)
        number = number.index_select(0, here)
        query = here // 8
        offset = (place - low).index_select(0, query) - corner.to(place.dtype).index_select(
            0, here % 8
        )  # [K, 3] in nodes
        near = 1 - offset.abs()
        x, y, z = near.unbind(1)
        strength = d**2 / 50
        slope = torch.stack([y * z, x * z, x * y], 1) * offset.sign() * (-strength * scale / 2)
        own = (query, number + start, x * y * z * strength, slope, offset * (2 / scale))
        if d in depths:
            rows = [torch.cat(columns) for columns in zip(*parts, own, strict=True)]
            found[d] = Around(rows[0], rows[1], rows[2], rows[3], rows[4], len(points))
        is_leaf = (~octree.is_occupied(d)[number]).nonzero().squeeze(1)
        parts.append(tuple(column.index_select(0, is_leaf) for column in own))
        start += octree.count(d)
    return found


def _numbers(octree: Octree, low: Tensor, corner: Tensor, samples: Tensor, depth: int) -> Tensor:
    """Numbers [P * 8] of the nodes at low [P, 3], whole, plus corner [8, 3]; -1 = no node."""
    raster = octree.raster(depth, _MARGIN)
    if raster is None:
        places = low.long()[:, None] + corner
        return octree.search(places.flatten(0, 1), samples.repeat_interleave(8), depth)
    side = raster.shape[-1]
    # Places far outside end in the margin, both corners of them.
    x, y, z = (low.clamp(-_MARGIN, side - _MARGIN - 2).long() + _MARGIN).unbind(1)
    first = ((samples * side + x) * side + y) * side + z
    steps = (corner[:, 0] * side + corner[:, 1]) * side + corner[:, 2]
    return raster.view(-1)[(first[:, None] + steps).flatten()].long()


def blend(values: Tensor, near: Around) -> Tensor:
    """F(x) [P] of node values [T, 4] = (gradient, offset)."""
    own = values.index_select(0, near.node)
    local = (own[:, :3] * near.offset).sum(1) + own[:, 3]
    total = scatter_sum((local * near.weight)[:, None], near.query, near.count)
    return total[:, 0] / (_weights(near) + _SMALL)


def blend_with_gradient(values: Tensor, near: Around) -> tuple[Tensor, Tensor]:
    """F(x) [P] and its gradient [P, 3], both linear in the values: training on gradients needs no second derivative by autograd."""
    own = values.index_select(0, near.node)
    local = (own[:, :3] * near.offset).sum(1) + own[:, 3]  # [K]
    rise = near.weight[:, None] * own[:, :3] + near.slope * local[:, None]
    both = torch.cat([(local * near.weight)[:, None], rise], 1)
    total = scatter_sum(both, near.query, near.count)
    weight = (_weights(near) + _SMALL)[:, None]
    slope = scatter_sum(near.slope, near.query, near.count)
    value = total[:, :1] / weight
    return value[:, 0], (total[:, 1:] - value * slope) / weight


def _weights(near: Around) -> Tensor:
    return scatter_sum(near.weight[:, None], near.query, near.count)[:, 0]
