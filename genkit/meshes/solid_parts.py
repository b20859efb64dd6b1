"""Simple parts of solids - boxes, round cones, lathed and extruded polygons - with their signed distances in closed form; many of a kind at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = tuple[float, float, float]
Polygon = Sequence[tuple[float, float]]
UPRIGHT: tuple[Vector, Vector, Vector] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def turned(axis: int, angle: float) -> tuple[Vector, Vector, Vector]:
    """Rotation matrix about a coordinate axis, `angle` in radians, counter-clockwise seen from its tip. Its columns are where the axes of a part point."""
    cos, sin = math.cos(angle), math.sin(angle)
    rows = [[0.0] * 3 for _ in range(3)]
    one, two = (axis + 1) % 3, (axis + 2) % 3
    rows[axis][axis] = 1.0
    rows[one][one], rows[one][two], rows[two][one], rows[two][two] = cos, -sin, sin, cos
    return tuple(tuple(row) for row in rows)  # type: ignore[return-value]


@dataclass(frozen=True)
class Box:
    """A box with half sides `half`, its edges rounded by `radius` (at most the smallest half side)."""

    center: Vector
    half: Vector
    radius: float = 0.0
    turn: tuple[Vector, Vector, Vector] = UPRIGHT


@dataclass(frozen=True)
class Cone:
    """The hull of two spheres, so also a capsule and, with a = b, a sphere. Neither sphere may lie inside the other unless a = b."""

    a: Vector
    b: Vector
    radius_a: float
    radius_b: float


@dataclass(frozen=True)
class Lathe:
    """A closed polygon of (radius, height), radius >= 0, turned about the y axis: cylinders, tubes, bowls, bottles."""

    profile: Polygon
    center: Vector = (0.0, 0.0, 0.0)
    turn: tuple[Vector, Vector, Vector] = UPRIGHT


@dataclass(frozen=True)
class Prism:
    """A closed convex polygon of (x, y) between z = -half and z = half."""

    outline: Polygon
    half: float
    center: Vector = (0.0, 0.0, 0.0)
    turn: tuple[Vector, Vector, Vector] = UPRIGHT


Part = Box | Cone | Lathe | Prism


class _Placed:
    """Parts that are turned and moved into place."""

    def __init__(self, parts: Sequence[Box | Lathe | Prism]) -> None:
        self.center = torch.tensor([part.center for part in parts])  # [K, 3]
        self.turn = torch.tensor([part.turn for part in parts])  # [K, 3, 3], columns = axes of the part

    def __len__(self) -> int:
        return len(self.center)

    def local(self, points: Tensor) -> Tensor:
        """[N, 3] -> [N, K, 3] as each part sees them."""
        return torch.einsum("nka,kab->nkb", points[:, None] - self.center, self.turn)

    def world(self, points: Tensor, directions: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """[M, 3] points and directions of the parts [M] -> the same in common coordinates."""
        turn = self.turn[part]
        return (
            torch.einsum("mb,mab->ma", points, turn) + self.center[part],
            torch.einsum("mb,mab->ma", directions, turn),
        )

    def _move(self, shift: Tensor, scale: float) -> None:
        self.center = (self.center + shift) * scale

    def _scale(self, scale: float) -> None:
        raise NotImplementedError

    def moved(self, shift: Tensor, scale: float) -> _Placed:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._move(shift, scale)
        other._scale(scale)
        return other


class Boxes(_Placed):
    def __init__(self, parts: Sequence[Box]) -> None:
        super().__init__(parts)
        self.radius = torch.tensor([part.radius for part in parts])  # [K]
        self.core = torch.tensor([part.half for part in parts]) - self.radius[:, None]  # [K, 3]
        if (self.core < 0).any():
            raise ValueError(f"the radius of a rounded box is more than half a side: {parts}")

    def distances(self, points: Tensor) -> Tensor:
        q = self.local(points).abs() - self.core  # [N, K, 3]
        return q.clamp_min(0).norm(dim=2) + q.amax(2).clamp_max(0) - self.radius

    def _pieces(self) -> Tensor:
        """[K, 7]: areas of the faces across each axis, of the rounded edges along each, and of the corners together."""
        x, y, z = (2 * self.core).unbind(1)
        faces = 2 * torch.stack([y * z, z * x, x * y], 1)
        edges = 2 * math.pi * self.radius[:, None] * 2 * self.core
        return torch.cat([faces, edges, 4 * math.pi * self.radius[:, None] ** 2], 1)

    def areas(self) -> Tensor:
        return self._pieces().sum(1)

    def sample(self, part: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        pieces = self._pieces()[part].double().cumsum(1)  # [M, 7]
        place = u[0].double()[:, None] * pieces[:, -1:]
        piece = torch.searchsorted(pieces, place, right=True)[:, 0].clamp_max_(6)
        before = torch.where(piece > 0, pieces.gather(1, (piece - 1).clamp_min(0)[:, None])[:, 0], 0.0)
        spare = ((place[:, 0] - before) / (pieces.gather(1, piece[:, None])[:, 0] - before)).float().clamp(0, 1)
        # A piece is known by the direction in which the core is moved out: an axis, a circle about one, or a sphere.
        axis = piece % 3
        direction = torch.zeros(len(part), 3)
        is_face, is_corner = piece < 3, piece == 6
        angle = 2 * math.pi * spare
        side = torch.where(spare < 0.5, -1.0, 1.0)
        rows = torch.arange(len(part))
        direction[rows, (axis + 1) % 3] = torch.where(is_face, 0.0, angle.cos())
        direction[rows, (axis + 2) % 3] = torch.where(is_face, 0.0, angle.sin())
        direction[rows, axis] = torch.where(is_face, side, 0.0)
        up = 2 * u[1] - 1
        ball = torch.stack([(1 - up**2).sqrt() * angle.cos(), (1 - up**2).sqrt() * angle.sin(), up], 1)
        direction = torch.where(is_corner[:, None], ball, direction)
        # Along the axes a direction has no share in, points spread over the core.
        spread = torch.empty(len(part), 3)
        spread[rows, axis] = u[2]
        spread[rows, (axis + 1) % 3] = u[1]
        spread[rows, (axis + 2) % 3] = u[2]
        core = self.core[part]
        base = torch.where(direction == 0, (2 * spread - 1) * core, direction.sign() * core)
        return self.world(base + self.radius[part, None] * direction, direction, part)

    def bounds(self) -> tuple[Tensor, Tensor]:
        reach = torch.einsum("kab,kb->ka", self.turn.abs(), self.core) + self.radius[:, None]
        return self.center - reach, self.center + reach

    def _scale(self, scale: float) -> None:
        self.core, self.radius = self.core * scale, self.radius * scale


class Cones:
    def __init__(self, parts: Sequence[Cone]) -> None:
        self.a, self.b = (torch.tensor([getattr(part, end) for part in parts]) for end in "ab")  # [K, 3]
        self.ra, self.rb = (torch.tensor([getattr(part, f"radius_{end}") for part in parts]) for end in "ab")
        length = (self.b - self.a).norm(dim=1)
        if (((self.ra - self.rb).abs() >= length) & ((length > 0) | (self.ra != self.rb))).any():
            raise ValueError(f"one end of a cone lies inside the other: {parts}")

    def __len__(self) -> int:
        return len(self.ra)

    def _frame(self) -> tuple[Tensor, Tensor, Tensor]:
        """Length [K], axis [K, 3], and the sine of the slope [K]: how much the normal leans along the axis."""
        length = (self.b - self.a).norm(dim=1)
        up = torch.tensor([0.0, 1.0, 0.0])
        axis = torch.where(length[:, None] > 0, (self.b - self.a) / length[:, None].clamp_min(1e-30), up)
        return length, axis, torch.where(length > 0, (self.ra - self.rb) / length.clamp_min(1e-30), 0.0)

    def distances(self, points: Tensor) -> Tensor:
        length, axis, sine = self._frame()
        from_a = points[:, None] - self.a  # [N, K, 3]
        along = (from_a * axis).sum(2)
        away = (from_a - along[..., None] * axis).norm(dim=2)
        # The foot on the axis lies where the normal of the mantle through the point starts.
        foot = (along - away * sine / (1 - sine**2).sqrt()).clamp_min(0).minimum(length)
        return torch.hypot(away, along - foot) - (self.ra - foot * sine)

    def _pieces(self) -> Tensor:
        """[K, 3]: areas of the cap at a, the mantle, and the cap at b."""
        length, _, sine = self._frame()
        mantle = math.pi * (self.ra + self.rb) * (1 - sine**2) * length
        return torch.stack([2 * math.pi * self.ra**2 * (1 + sine), mantle, 2 * math.pi * self.rb**2 * (1 - sine)], 1)

    def areas(self) -> Tensor:
        return self._pieces().sum(1)

    def sample(self, part: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        length, axis, sine = (value[part] for value in self._frame())
        ra, rb = self.ra[part], self.rb[part]
        pieces = self._pieces()[part].double().cumsum(1)
        place = u[0].double() * pieces[:, 2]
        piece = (place[:, None] >= pieces[:, :2]).sum(1)
        # Height of the normal along the axis: from -1 to the slope at a, from the slope to 1 at b.
        up = torch.where(piece == 0, -1 + u[1] * (1 + sine), torch.where(piece == 1, sine, sine + u[1] * (1 - sine)))
        share = torch.where(piece == 0, 0.0, torch.where(piece == 1, _along(u[1], ra, rb), 1.0))
        angle = 2 * math.pi * u[2]
        one, two = _across(axis)
        ring = one * angle.cos()[:, None] + two * angle.sin()[:, None]
        normal = ring * (1 - up**2).clamp_min(0).sqrt()[:, None] + axis * up[:, None]
        radius = ra + (rb - ra) * share
        return self.a[part] + axis * (length * share)[:, None] + normal * radius[:, None], normal

    def bounds(self) -> tuple[Tensor, Tensor]:
        return (
            torch.minimum(self.a - self.ra[:, None], self.b - self.rb[:, None]),
            torch.maximum(self.a + self.ra[:, None], self.b + self.rb[:, None]),
        )

    def moved(self, shift: Tensor, scale: float) -> Cones:
        other = object.__new__(Cones)
        other.a, other.b = (self.a + shift) * scale, (self.b + shift) * scale
        other.ra, other.rb = self.ra * scale, self.rb * scale
        return other


class _Outlined(_Placed):
    """Parts made from a closed polygon each; shorter ones repeat their first corner."""

    def __init__(self, parts: Sequence[Lathe | Prism], outlines: Sequence[Polygon]) -> None:
        super().__init__(parts)
        longest = max(map(len, outlines))
        padded = [[*outline, *[outline[0]] * (longest - len(outline))] for outline in outlines]
        self.start = torch.tensor(padded)  # [K, E, 2], where each edge starts
        area = (self.start[..., 0] * self.end[..., 1] - self.start[..., 1] * self.end[..., 0]).sum(1)
        # All run counter-clockwise, so that outside is to the right.
        self.start = torch.where(area[:, None, None] < 0, self.start.flip(1), self.start)

    @property
    def end(self) -> Tensor:
        return self.start.roll(-1, 1)

    def flat(self, x: Tensor, y: Tensor, skipped: Tensor | None = None) -> Tensor:
        """Signed distance in the plane of the polygons, [N, K] each -> [N, K]; edges `skipped` [K, E] are no border."""
        start, step = self.start, self.end - self.start
        squared = (step**2).sum(-1)
        to_x, to_y = x[..., None] - start[..., 0], y[..., None] - start[..., 1]  # [N, K, E]
        share = ((to_x * step[..., 0] + to_y * step[..., 1]) / squared.clamp_min(1e-30)).clamp(0, 1)
        away = (to_x - share * step[..., 0]) ** 2 + (to_y - share * step[..., 1]) ** 2
        if skipped is not None:
            away = away.masked_fill(skipped, math.inf)
        # Inside when a ray towards +x meets an odd number of edges.
        crosses = (to_y < 0) != (y[..., None] < self.end[..., 1])
        side = (
            to_x * step[..., 1] - to_y * step[..., 0]
        )  # below 0 = the edge lies to the right of the point, if it rises
        meets = crosses & ((side < 0) == (step[..., 1] > 0))
        least = away.amin(2)
        distance = torch.where(least > 0, least.clamp_min(1e-30).sqrt(), 0.0)
        return torch.where(meets.sum(2) % 2 == 1, -distance, distance)

    def _scale(self, scale: float) -> None:
        self.start = self.start * scale


class Lathes(_Outlined):
    def __init__(self, parts: Sequence[Lathe]) -> None:
        super().__init__(parts, [part.profile for part in parts])
        if (self.start[..., 0] < 0).any():
            raise ValueError(f"a profile crosses the axis it turns about: {parts}")

    @property
    def on_axis(self) -> Tensor:
        return (self.start[..., 0] == 0) & (self.end[..., 0] == 0)

    def distances(self, points: Tensor) -> Tensor:
        local = self.local(points)
        # The square root has no slope on the axis itself.
        radius = (local[..., 0] ** 2 + local[..., 2] ** 2).clamp_min(1e-20).sqrt()
        return self.flat(radius, local[..., 1], self.on_axis)

    def _bands(self) -> Tensor:
        """[K, E]: the area each edge sweeps."""
        return math.pi * (self.start[..., 0] + self.end[..., 0]) * (self.end - self.start).norm(dim=2)

    def areas(self) -> Tensor:
        return self._bands().sum(1)

    def sample(self, part: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        bands = self._bands()[part].double().cumsum(1)
        edge = torch.searchsorted(bands, u[0].double()[:, None] * bands[:, -1:], right=True)[:, 0]
        edge = edge.clamp_max_(bands.shape[1] - 1)
        start, end = self.start[part, edge], self.end[part, edge]  # [M, 2]
        place = start + (end - start) * _along(u[1], start[:, 0], end[:, 0])[:, None]
        out = torch.nn.functional.normalize(end - start, dim=1)
        angle = 2 * math.pi * u[2]
        cos, sin = angle.cos(), angle.sin()
        points = torch.stack([place[:, 0] * cos, place[:, 1], place[:, 0] * sin], 1)
        normals = torch.stack([out[:, 1] * cos, -out[:, 0], out[:, 1] * sin], 1)
        return self.world(points, normals, part)

    def bounds(self) -> tuple[Tensor, Tensor]:
        axis = self.turn[..., 1]  # [K, 3]
        ring = (1 - axis**2).clamp_min(0).sqrt()  # how far a circle about the axis reaches along each coordinate
        middle = self.start[..., 1:] * axis[:, None]  # [K, E, 3]
        reach = self.start[..., :1] * ring[:, None]
        return self.center + (middle - reach).amin(1), self.center + (middle + reach).amax(1)


class Prisms(_Outlined):
    def __init__(self, parts: Sequence[Prism]) -> None:
        super().__init__(parts, [part.outline for part in parts])
        self.half = torch.tensor([part.half for part in parts])  # [K]
        one, two = self.end - self.start, self.end.roll(-1, 1) - self.end
        if ((one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0]) < -1e-6).any():
            raise ValueError(f"the outline of a prism is not convex: {parts}")

    def distances(self, points: Tensor) -> Tensor:
        x, y, z = self.local(points).unbind(-1)
        flat, beyond = self.flat(x, y), z.abs() - self.half
        outside = (flat.clamp_min(0) ** 2 + beyond.clamp_min(0) ** 2).clamp_min(1e-30).sqrt()
        inside = torch.maximum(flat, beyond)
        return torch.where(inside > 0, outside, inside)

    def _pieces(self) -> Tensor:
        """[K, E + (E - 2) * 2]: areas of the sides, then of the triangles of the front, then of those of the back."""
        sides = (self.end - self.start).norm(dim=2) * 2 * self.half[:, None]
        one, two = self.start[:, 1:-1] - self.start[:, :1], self.start[:, 2:] - self.start[:, :1]
        fans = (one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0]).abs() / 2
        return torch.cat([sides, fans, fans], 1)

    def areas(self) -> Tensor:
        return self._pieces().sum(1)

    def sample(self, part: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        E = self.start.shape[1]
        pieces = self._pieces()[part].double().cumsum(1)
        piece = torch.searchsorted(pieces, u[0].double()[:, None] * pieces[:, -1:], right=True)[:, 0]
        piece = piece.clamp_max_(pieces.shape[1] - 1)
        half, is_side = self.half[part], piece < E
        edge = piece.clamp_max(E - 1)
        start, end = self.start[part, edge], self.end[part, edge]
        out = torch.nn.functional.normalize(end - start, dim=1)
        on_side = torch.cat([start + (end - start) * u[1, :, None], ((2 * u[2] - 1) * half)[:, None]], 1)
        side_normal = torch.stack([out[:, 1], -out[:, 0], torch.zeros_like(half)], 1)
        fan, is_back = (piece - E).clamp_min(0) % (E - 2), piece >= 2 * E - 2
        a, b, c = self.start[part, 0], self.start[part, fan + 1], self.start[part, fan + 2]
        root = u[1].sqrt()[:, None]
        flat = a * (1 - root) + root * (b * (1 - u[2, :, None]) + c * u[2, :, None])
        facing = torch.where(is_back, -1.0, 1.0)
        on_cap = torch.cat([flat, (facing * half)[:, None]], 1)
        cap_normal = torch.stack([torch.zeros_like(half), torch.zeros_like(half), facing], 1)
        points = torch.where(is_side[:, None], on_side, on_cap)
        return self.world(points, torch.where(is_side[:, None], side_normal, cap_normal), part)

    def bounds(self) -> tuple[Tensor, Tensor]:
        flat = torch.einsum("keb,kab->kea", self.start, self.turn[..., :2])  # [K, E, 3]
        thick = self.turn[..., 2].abs() * self.half[:, None]
        return self.center + flat.amin(1) - thick, self.center + flat.amax(1) + thick

    def _scale(self, scale: float) -> None:
        super()._scale(scale)
        self.half = self.half * scale


def _along(u: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Shares [M] of the way along a strip whose width goes evenly from `first` to `last`, spread over its area."""
    # The area up to the share s is (first s + (last - first) s^2 / 2) / mean; this form of the root is steady where the widths are equal.
    mean = (first + last) / 2
    under = (first**2 + 2 * (last - first) * mean * u).clamp_min(0)
    return (2 * mean * u / (first + under.sqrt()).clamp_min(1e-30)).clamp(0, 1)


def _across(axis: Tensor) -> tuple[Tensor, Tensor]:
    """Two directions at right angles to each other and to `axis` [M, 3]."""
    helper = torch.where(axis[:, :1].abs() < 0.9, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    one = torch.nn.functional.normalize(torch.linalg.cross(axis, helper), dim=1)
    return one, torch.linalg.cross(axis, one)
