"""Orders in which a sequence model may visit the tokens of a grid, as permutations.

By name, for grids of any number of axes unless said otherwise (an order of a volume does its planes one after the other):

    raster            along the last axis, as tokens lie
    column            along the second last axis; needs two axes
    zigzag            raster with every other line backwards, so that neighbours in the order are neighbours on the grid
    hilbert           a generalised Hilbert curve over any Y x X: neighbours stay neighbours, places near each other stay near (for a
                      side that is odd one diagonal step may occur)
    sweep-0 .. 7      raster from the four corners, then column from the four corners; needs two axes
    zigzag-0 .. 7     the same eight with every other line backwards (Hu et al., "ZigMa", ECCV 2024)
    reversed-<name>   backwards

Schedules name the orders of successive layers: "sweep-8", "zigzag-8", and "sweep-4", what DiMSUM (2024) released: rows, rows backwards,
columns, columns backwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from genkit.errors import UsageError, nearest

SCHEDULES = {
    "sweep-4": ("raster", "reversed-raster", "column", "reversed-column"),
    "sweep-8": tuple(f"sweep-{i}" for i in range(8)),
    "zigzag-8": tuple(f"zigzag-{i}" for i in range(8)),
}
ORDERS = ("raster", "column", "zigzag", "hilbert", *SCHEDULES["sweep-8"], *SCHEDULES["zigzag-8"])


@dataclass(frozen=True)
class ScanOrder:
    """A permutation of the N tokens of a grid, and the way back."""

    index: Tensor  # [N] int64: the token that comes n-th
    inverse: Tensor  # [N] int64: when a token comes
    is_raster: bool  # nothing moves

    def visit(self, x: Tensor) -> Tensor:
        """Tokens [B, N, ...] as the order visits them."""
        return x if self.is_raster else x.index_select(1, self.index)

    def put_back(self, x: Tensor) -> Tensor:
        """What was visited, [B, N, ...], back in its place."""
        return x if self.is_raster else x.index_select(1, self.inverse)


@lru_cache(maxsize=256)
def scan_order(name: str, grid: tuple[int, ...], device: torch.device | str = "cpu") -> ScanOrder:
    """The order of this name on a grid; equal arguments return the same object.

    Raises: UsageError for an unknown name, or a grid with too few axes.
    """
    with torch.inference_mode(False):
        index = torch.tensor(_visits(check(name), grid), dtype=torch.int64, device=device)
        return ScanOrder(index, index.argsort(), bool((index == torch.arange(len(index), device=device)).all()))


def schedule(names: str | list[str] | tuple[str, ...], layer: int) -> str:
    """The order of a layer: names are repeated through the depth, a single name may be that of a schedule.

    Raises: UsageError for an unknown name.
    """
    found: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        found += SCHEDULES.get(name) or [check(name)]
    if not found:
        raise UsageError("an empty list of scan orders")
    return found[layer % len(found)]


def check(name: str) -> str:
    """The name, when there is such an order. Raises UsageError when there is not."""
    if name.removeprefix("reversed-") not in ORDERS:
        raise UsageError(f"scan order '{name}': {nearest(name, [*ORDERS, *SCHEDULES])} (or reversed-...)")
    return name


def _visits(name: str, grid: tuple[int, ...]) -> list[int]:
    """Token numbers in the order of visiting."""
    if name.startswith("reversed-"):
        return _visits(name.removeprefix("reversed-"), grid)[::-1]
    if name == "raster":
        return list(range(math.prod(grid)))
    if name == "zigzag":
        return _zigzag(grid)
    if len(grid) == 1 and name == "hilbert":
        return list(range(grid[0]))
    if len(grid) < 2:
        raise UsageError(f"scan order '{name}' needs a grid of two axes or more, found {list(grid)}")
    *outer, Y, X = grid
    if name == "hilbert":
        plane = [y * X + x for x, y in _hilbert(0, 0, X, 0, 0, Y)] if X >= Y else _hilbert_tall(Y, X)
    elif name == "column":
        plane = _corner("sweep", 4, Y, X)
    else:
        kind, number = name.split("-")
        plane = _corner(kind, int(number), Y, X)
    visits = []
    for i in range(math.prod(outer)):
        # A curve that fills planes in turns goes back through every other one, which keeps the ends of planes together.
        there = plane if name != "hilbert" or i % 2 == 0 else plane[::-1]
        visits += [i * Y * X + place for place in there]
    return visits


def _zigzag(grid: tuple[int, ...]) -> list[int]:
    if len(grid) == 1:
        return list(range(grid[0]))
    inner = _zigzag(grid[1:])
    visits = []
    for i in range(grid[0]):
        visits += [i * len(inner) + place for place in (inner if i % 2 == 0 else inner[::-1])]
    return visits


def _corner(kind: str, number: int, Y: int, X: int) -> list[int]:
    """Lines of a plane from one of its corners: numbers 0-3 rows, 4-7 columns; bit 0 from the right, bit 1 from the bottom."""
    ys = list(range(Y))[:: -1 if number & 2 else 1]
    xs = list(range(X))[:: -1 if number & 1 else 1]
    lines = [[y * X + x for x in xs] for y in ys] if number < 4 else [[y * X + x for y in ys] for x in xs]
    if kind == "zigzag":
        lines = [line if i % 2 == 0 else line[::-1] for i, line in enumerate(lines)]
    return [place for line in lines for place in line]


def _hilbert_tall(Y: int, X: int) -> list[int]:
    return [y * X + x for x, y in _hilbert(0, 0, 0, Y, X, 0)]


def _hilbert(x: int, y: int, ax: int, ay: int, bx: int, by: int) -> list[tuple[int, int]]:
    """(x, y) of a curve from one corner of a rectangle along its long side a = (ax, ay), the other side being b = (bx, by).

    A rectangle much longer than high is cut in two along a; any other in three, with the first and last part turned to run along b. Halves
    are kept even where they can be, which is what keeps steps straight.
    """
    long, high = abs(ax + ay), abs(bx + by)
    step_a = ((ax > 0) - (ax < 0), (ay > 0) - (ay < 0))
    step_b = ((bx > 0) - (bx < 0), (by > 0) - (by < 0))
    if high == 1:
        return [(x + i * step_a[0], y + i * step_a[1]) for i in range(long)]
    if long == 1:
        return [(x + i * step_b[0], y + i * step_b[1]) for i in range(high)]
    half_long, half_high = long // 2, high // 2
    if 2 * long > 3 * high:
        half_long += half_long % 2 if long > 2 else 0
        hx, hy = half_long * step_a[0], half_long * step_a[1]
        return _hilbert(x, y, hx, hy, bx, by) + _hilbert(x + hx, y + hy, ax - hx, ay - hy, bx, by)
    half_high += half_high % 2 if high > 2 else 0
    hx, hy = half_long * step_a[0], half_long * step_a[1]
    gx, gy = half_high * step_b[0], half_high * step_b[1]
    first = _hilbert(x, y, gx, gy, hx, hy)
    middle = _hilbert(x + gx, y + gy, ax, ay, bx - gx, by - gy)
    last_x, last_y = x + ax - step_a[0] + gx - step_b[0], y + ay - step_a[1] + gy - step_b[1]
    return first + middle + _hilbert(last_x, last_y, -gx, -gy, hx - ax, hy - ay)
