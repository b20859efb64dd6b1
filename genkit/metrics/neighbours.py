"""Nearest neighbours among many vectors: exact answers, fast arithmetic, and no more memory than a fixed bound.

Distances are scanned in single precision as |x|^2 + |y|^2 - 2 xy, a matrix product. That form is off by rounding, so whatever lies too close
to a decision for it (the last of k neighbours, the edge of a ball) is measured again from differences in double precision. What comes out
is what `torch.cdist` decides in float64, at the price of float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from genkit.errors import UsageError

# Elements of the largest temporary array: 64 MB in single, 128 MB in double precision. A handful of these live at once, beside a centred copy
# of both sets.
BLOCK = 2**24
_SPARE = 6  # candidates beyond the k asked for: with fewer, crowded places have to be looked at twice


def kth_distance(x: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th nearest other row. A duplicate is another row, at distance 0.

    Args:
        x: [N, D], N > k.

    Returns: [N] float64. Raises UsageError for k rows or fewer.
    """
    if len(x) <= k:
        raise UsageError(f"the distance to neighbour {k} needs more than {k} vectors, got {len(x)}")
    return _kth_nearest(x, x, k, torch.arange(len(x), device=x.device))[0]


def nearest(x: Tensor, y: Tensor, itself: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The row of `y` nearest to each row of `x`; the first of several that are equally near.

    Args:
        x: [N, D].
        y: [M, D].
        itself: [N] int64, for each row of `x` the number of the row of `y` it must not find.

    Returns: distances [N] float64 and numbers [N] int64. Raises UsageError where there is nothing to find.
    """
    if len(y) <= (itself is not None):
        raise UsageError(f"a nearest neighbour needs something to be near to; the other set has {len(y)} vectors")
    return _kth_nearest(x, y, 1, itself)


def count_balls(points: Tensor, centres: Tensor, radii: Tensor, *, closed: bool) -> tuple[Tensor, Tensor]:
    """How many balls hold each point, and how many points each ball holds.

    Args:
        points: [N, D].
        centres: [M, D].
        radii: [M] float64.
        closed: whether a point whose distance equals the radius is inside.

    Returns: [N] and [M] int64.
    """
    x, y, rounding = _prepare(points, centres)
    x_norm, y_norm, squared = x.square().sum(1), y.square().sum(1), radii.square().float()
    of_points, of_balls = (torch.zeros(len(side), dtype=torch.int64, device=x.device) for side in (x, y))
    for rows in _blocks(len(x), len(y)):
        gap = torch.addmm((y_norm - squared)[None], x[rows], y.T, alpha=-2).add_(x_norm[rows, None])  # [b, M]
        unsure = gap.abs() <= rounding * (x_norm[rows, None] + (y_norm + squared)[None])
        surely = (gap < 0) & ~unsure
        of_points[rows] += surely.sum(1)
        of_balls += surely.sum(0)
        for pairs in unsure.nonzero().split(max(1, BLOCK // x.shape[1])):
            i, j = pairs[:, 0] + rows.start, pairs[:, 1]
            distance = _exact(points[i], centres[j, None])[:, 0]
            inside = distance <= radii[j] if closed else distance < radii[j]
            of_points.index_add_(0, i, inside.long())
            of_balls.index_add_(0, j, inside.long())
    return of_points, of_balls


def _kth_nearest(x: Tensor, y: Tensor, k: int, itself: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distance [N] of each row of `x` to its k-th nearest row of `y`, and the first number [N] of a row at that distance."""
    distances = torch.empty(len(x), dtype=torch.float64, device=x.device)
    numbers = torch.empty(len(x), dtype=torch.int64, device=x.device)
    a, b, rounding = _prepare(x, y)
    # No distance is smaller than what it was computed as, less its rounding: candidates are chosen by this lower bound.
    a_least, b_least = (1 - rounding) * a.square().sum(1), (1 - rounding) * b.square().sum(1)
    wanted = min(k + _SPARE, len(y))
    for rows in _blocks(len(x), max(len(y), wanted * x.shape[1])):
        bound = torch.addmm(b_least[None], a[rows], b.T, alpha=-2).add_(a_least[rows, None])  # [b, M], of squares
        bound, number = bound.topk(wanted, dim=1, largest=False)
        distance = _exact(x[rows], y[number])
        if itself is not None:
            distance = distance.masked_fill(number == itself[rows, None], math.inf)
        distances[rows], numbers[rows] = _pick(distance, number, k)
        if wanted < len(y):
            # Rows that were no candidates are at least as far as the last bound. Where that is no proof, everything is measured.
            for row in (rows.start + (bound[:, -1] <= distances[rows].square()).nonzero()[:, 0]).tolist():
                parts = [_exact(x[row, None], part[None])[0] for part in y.split(max(1, BLOCK // x.shape[1]))]
                everything = torch.cat(parts)
                if itself is not None:
                    everything[itself[row]] = math.inf
                number = torch.arange(len(y), device=x.device)
                distances[row], numbers[row] = _pick(everything[None], number[None], k)
    return distances, numbers


def _pick(distance: Tensor, number: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest of distances [b, m], and the smallest number among those that have it."""
    kth = distance.kthvalue(k, dim=1).values
    return kth, number.masked_fill(distance != kth[:, None], torch.iinfo(torch.int64).max).amin(dim=1)


def _prepare(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both sets in single precision about their common centre, where norms and with them rounding are small, and that rounding.

    A squared distance computed as |x|^2 + |y|^2 - 2 xy is off by less than rounding * (|x|^2 + |y|^2): sums of D terms, each rounded
    to 2^-24, go astray like sqrt(D). (Largest error seen: a fifth of it at D = 5, a thirtieth at D = 2048.)
    """
    centre = (x.mean(0, dtype=torch.float64) + y.mean(0, dtype=torch.float64)).div(2).float()
    return x.float() - centre, y.float() - centre, 2.0**-23 * (8 + math.sqrt(x.shape[1]))


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """Distances [n, m] float64 of x [n, D] to y [n, m, D], from differences."""
    return torch.cdist(x.double()[:, None], y.double(), compute_mode="donot_use_mm_for_euclid_dist")[:, 0]


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of so many rows that an array of `width` columns has no more than BLOCK elements."""
    step = max(1, BLOCK // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
