"""What every class of procedural shapes is made with: dice, a design, and parts that recur."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from genkit.meshes.solid_parts import Cone, Lathe, Part, Polygon, Vector


class Dice:
    """Random choices in a fixed order from numbers in [0, 1)."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def pick(self, *options: str) -> str:
        return options[int(next(self._numbers) * len(options))]

    def count(self, low: int, high: int) -> int:
        """low .. high, both included."""
        return low + int(next(self._numbers) * (high - low + 1))

    def chance(self, share: float) -> bool:
        return next(self._numbers) < share


@dataclass
class Design:
    """What a class function makes.

    Attributes:
        parts: of the solid.
        caption: a few words about it.
        style: the discrete choices by name, for conditioning and for counting which combinations a model covers.
    """

    parts: list[Part]
    caption: str
    style: dict[str, str] = field(default_factory=dict)


def cylinder(bottom: Vector, radius: float, height: float, top: float | None = None) -> Lathe:
    """Upright, from the middle of its bottom; `top` = radius at the upper end."""
    upper = radius if top is None else top
    return Lathe([(0.0, 0.0), (radius, 0.0), (upper, height), (0.0, height)], bottom)


def hollow_dome(center: Vector, radius: float, height: float, thickness: float, steps: int = 10) -> Lathe:
    """Half a hollow ellipsoid, open below."""
    angles = [math.pi / 2 * i / steps for i in range(steps + 1)]
    outer = [(radius * math.cos(a), height * math.sin(a)) for a in angles]
    inner = [((radius - thickness) * math.cos(a), (height - thickness) * math.sin(a)) for a in reversed(angles)]
    return Lathe([(max(r, 0.0) if r > 1e-9 else 0.0, y) for r, y in outer + inner], center)


def rod(a: Vector, b: Vector, radius: float, end: float | None = None) -> Cone:
    return Cone(a, b, radius, radius if end is None else end)


def bent_rod(points: list[Vector], radius: float) -> list[Part]:
    """A bent rod through points."""
    return [rod(a, b, radius) for a, b in itertools.pairwise(points)]


def corners(x: float, z: float) -> list[tuple[float, float]]:
    return [(-x, -z), (x, -z), (-x, z), (x, z)]


def spread(low: float, high: float, count: int) -> list[float]:
    """`count` places between two ends, the ends included."""
    return [low + (high - low) * i / max(1, count - 1) for i in range(count)] if count > 1 else [(low + high) / 2]


def smooth(points: Polygon, steps: int = 5) -> list[tuple[float, float]]:
    """A line through points, rounded (Catmull and Rom 1974)."""
    line = [points[0], *points, points[-1]]
    found = [points[0]]
    for p0, p1, p2, p3 in zip(line, line[1:], line[2:], line[3:], strict=False):
        for i in range(1, steps + 1):
            t = i / steps
            weights = (
                (-t + 2 * t**2 - t**3) / 2,
                (2 - 5 * t**2 + 3 * t**3) / 2,
                (t + 4 * t**2 - 3 * t**3) / 2,
                (-(t**2) + t**3) / 2,
            )
            x, y = (sum(w * p[a] for w, p in zip(weights, (p0, p1, p2, p3), strict=True)) for a in (0, 1))
            found.append((max(x, 0.01), y))
    return found


def product(a: tuple[Vector, Vector, Vector], b: tuple[Vector, Vector, Vector]) -> tuple[Vector, Vector, Vector]:
    rows = [[sum(a[i][k] * b[k][j] for k in range(3)) for j in range(3)] for i in range(3)]
    return tuple(tuple(row) for row in rows)  # type: ignore[return-value]
