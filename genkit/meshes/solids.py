"""Solids made of simple parts, with exact distances and exact points on their surface; no grid and no triangles in between.

A solid is the union of boxes, round cones, lathed and extruded polygons. Each knows its own signed distance in closed form. The smallest of them is
the distance to the union wherever a point is outside, and has the right sign everywhere; inside, where parts overlap, it is a lower bound of the
depth, which `Solid.signed_distance` replaces by the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkit.meshes.solid_parts import Box, Boxes, Cone, Cones, Lathe, Lathes, Part, Prism, Prisms
from genkit.rng import Rng

_TOUCHING = 1e-5  # closer than this, surfaces of two parts count as one


class Solid:
    """The union of parts.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        makers: dict[type, Callable] = {Box: Boxes, Cone: Cones, Lathe: Lathes, Prism: Prisms}
        self.kinds = []
        for kind, maker in makers.items():
            own = [part for part in parts if isinstance(part, kind)]
            if own:
                self.kinds.append(maker(own))
        self.num_parts = len(parts)

    def distances(self, points: Tensor) -> Tensor:
        """Signed distance to every part, negative inside: [N, 3] -> [N, num_parts], parts in the order box, cone, lathe, prism."""
        return torch.cat([kind.distances(points) for kind in self.kinds], 1)

    def distance(self, points: Tensor) -> Tensor:
        """[N, 3] -> [N]: the least of `distances`. Exact outside; inside, the depth is at least what it says."""
        return self.distances(points).amin(1)

    @property
    def areas(self) -> Tensor:
        """[num_parts] of each part alone."""
        return torch.cat([kind.areas() for kind in self.kinds])

    @property
    def bounds(self) -> Tensor:
        """[2, 3], exact."""
        least, greatest = zip(*(kind.bounds() for kind in self.kinds), strict=True)
        return torch.stack([torch.cat(least).amin(0), torch.cat(greatest).amax(0)])

    def moved(self, shift: Tensor, scale: float) -> Solid:
        """Every point p at (p + shift) * scale."""
        other = Solid.__new__(Solid)
        other.num_parts, other.kinds = self.num_parts, [kind.moved(shift, scale) for kind in self.kinds]
        return other

    def normalised(self, size: float = 1.6) -> Solid:
        """Centred, the longest side of its bounding box `size`."""
        least, greatest = self.bounds
        return self.moved(-(least + greatest) / 2, size / float((greatest - least).max()))

    def sample_surface(self, count: int, rng: Rng) -> tuple[Tensor, Tensor]:
        """Points drawn uniformly over the surface of the union, and its normals there: two [count, 3].

        Points on a part that another part covers are drawn again.

        Args:
            rng: one stream.
        """
        rng = rng.fork("surface")
        points, normals, found = [], [], 0
        while found < count:
            drawn, directions, part = self._on_parts(2 * count, rng)
            distances = self.distances(drawn)
            # Where two parts share a piece of surface, the first one has it.
            earlier = torch.arange(self.num_parts) < part[:, None]
            limit = torch.where(earlier, _TOUCHING, -_TOUCHING)
            open_ = (distances.scatter(1, part[:, None], math.inf) > limit).all(1)
            points.append(drawn[open_])
            normals.append(directions[open_])
            found += len(points[-1])
        return torch.cat(points)[:count], torch.cat(normals)[:count]

    def signed_distance(self, points: Tensor, surface: Tensor) -> Tensor:
        """[N, 3] -> [N], exact outside and wherever the nearest point of the part a point is deepest in lies open.

        Args:
            surface: [P, 3] points drawn by `sample_surface`. Where the nearest point of that part is covered by another part, the distance to the
                nearest of them is taken: too large by less than half the square of their spacing over the distance.
        """
        with torch.enable_grad():
            where = points.detach().requires_grad_()
            distance = self.distance(where)
            (slope,) = torch.autograd.grad(distance.sum(), where)
        distance = distance.detach()
        foot = points - distance[:, None] * torch.nn.functional.normalize(slope, dim=1)
        covered = (distance < 0) & (self.distance(foot) < -_TOUCHING)
        if covered.any():
            least = torch.cdist(points[covered], surface).amin(1)
            distance[covered] = -torch.maximum(-distance[covered], least)
        return distance

    def _on_parts(self, count: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """Points over the areas of all parts, in random order: [count, 3], normals [count, 3], parts [count]."""
        u = rng.uniform(5, count)[0]  # [5, count]
        cumulative = self.areas.double().cumsum(0)
        place = (torch.arange(count) + u[0].double()) / count * cumulative[-1]
        order = u[4].argsort()
        part = torch.searchsorted(cumulative, place, right=True).clamp_max_(self.num_parts - 1)[order]
        points, normals = torch.empty(count, 3), torch.empty(count, 3)
        first = 0
        for kind in self.kinds:
            own = ((part >= first) & (part < first + len(kind))).nonzero()[:, 0]
            points[own], normals[own] = kind.sample(part[own] - first, u[1:4, own])
            first += len(kind)
        return points, normals, part
