"""Marching cubes: the surface where values on a grid change sign, as triangles (Lorensen and Cline 1987).

The table of cases is computed here from one rule for faces: where the corners of a cell's face alternate, the inner corners are kept apart. What happens on a
face then depends on that face alone, so that neighbours agree and no crack can open; the diagonals of the triangles stay off the faces, so that every edge of
the result joins exactly two triangles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from genkit.meshes.mesh import Mesh

# Corner c of a cell has the offset (c & 1, c >> 1 & 1, c >> 2) along x, y, z. Edges by their two corners, those along x first.
_EDGES = [(c, c | 1 << axis) for axis in range(3) for c in range(8) if not c >> axis & 1]
# Corners of every face in order around it, counter-clockwise seen from outside.
_FACES = [(0, 4, 6, 2), (1, 3, 7, 5), (0, 1, 5, 4), (2, 6, 7, 3), (0, 2, 3, 1), (4, 5, 7, 6)]
_MARGIN = 1e-3  # of an edge, that vertices stay away from its ends: no two of them fall together


def marching_cubes(values: Tensor, *, level: float = 0.0, bounds: tuple[float, float] = (-1.0, 1.0)) -> Mesh:
    """The surface between values below `level`, which is inside, and above.

    Args:
        values: [X, Y, Z], at least 2 along each axis, at evenly spaced places.
        bounds: coordinates of the first and the last place along each axis.

    Returns: a mesh whose faces look outwards; without faces where no value changes sign. Watertight unless the surface reaches the border of the grid.
    Raises: ValueError for another shape, and values that are not finite.
    """
    if values.ndim != 3 or min(values.shape) < 2:
        raise ValueError(f"values must be [X, Y, Z] with at least 2 along each axis, got {list(values.shape)}")
    if not values.isfinite().all():
        raise ValueError(f"{int((~values.isfinite()).sum())} of {values.numel()} values are not finite")
    inside = values < level
    X, Y, Z = values.shape
    strides = torch.tensor([Y * Z, Z, 1])
    case = torch.zeros(X - 1, Y - 1, Z - 1, dtype=torch.int64)
    for c in range(8):
        dx, dy, dz = c & 1, c >> 1 & 1, c >> 2
        case += inside[dx : X - 1 + dx, dy : Y - 1 + dy, dz : Z - 1 + dz].long() << c
    cells = ((case > 0) & (case < 255)).nonzero()  # [M, 3]
    return _triangles(
        case[tuple(cells.unbind(1))],
        (cells * strides).sum(1),
        strides,
        lambda places: values.reshape(-1)[places] - level,
        tuple(values.shape),
        bounds,
    )


def extract(
    distance: Callable[[Tensor], Tensor],
    resolution: int,
    *,
    level: float = 0.0,
    bounds: tuple[float, float] = (-1.0, 1.0),
    coarse: int = 8,
) -> Mesh:
    """The surface of a function, evaluated only near it.

    Args:
        distance: [N, 3] -> [N], negative inside. May nowhere be larger in size than the distance to the surface, so that cells far from it can be left out.
        resolution: cells per axis.
        coarse: cells per axis of the blocks that are kept or left out as a whole.
    """
    low, high = bounds
    step = (high - low) / resolution
    blocks = -(-resolution // coarse)
    middle = (torch.arange(blocks) * coarse + coarse / 2) * step + low
    centers = torch.cartesian_prod(middle, middle, middle)
    reach = coarse * step * 3**0.5 / 2
    kept = ((distance(centers) - level).abs() <= reach * 1.001 + step).nonzero()[:, 0]
    corner = torch.stack([kept // blocks**2, kept // blocks % blocks, kept % blocks], 1) * coarse  # [K, 3]
    local = torch.arange(coarse + 1)
    offsets = torch.cartesian_prod(local, local, local)  # [(coarse + 1)^3, 3]
    places = corner[:, None] + offsets  # [K, (coarse + 1)^3, 3]
    side = blocks * coarse + 1
    strides = torch.tensor([side * side, side, 1])
    flat, which = torch.unique((places * strides).sum(2), return_inverse=True)
    where = torch.stack([flat // side**2, flat // side % side, flat % side], 1) * step + low
    values = torch.cat([distance(part) for part in where.split(1 << 16)]) if len(where) else where[:, 0]
    values = values - level
    grid = values[which].reshape(-1, coarse + 1, coarse + 1, coarse + 1)
    inside = grid < 0
    case = torch.zeros(len(kept), coarse, coarse, coarse, dtype=torch.int64)
    for c in range(8):
        dx, dy, dz = c & 1, c >> 1 & 1, c >> 2
        case += inside[:, dx : coarse + dx, dy : coarse + dy, dz : coarse + dz].long() << c
    found = ((case > 0) & (case < 255)).nonzero()  # [M, 4]
    return _triangles(
        case[tuple(found.unbind(1))],
        ((corner[found[:, 0]] + found[:, 1:]) * strides).sum(1),
        strides,
        lambda asked: values[torch.searchsorted(flat, asked)],
        (side, side, side),
        (low, low + step * (side - 1)),
    )


def _triangles(
    case: Tensor,
    first: Tensor,
    strides: Tensor,
    value_at: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    bounds: tuple[float, float],
) -> Mesh:
    """Mesh of cells that the surface passes through.

    Args:
        case: [M], which corners are inside, bit c for corner c.
        first: [M], number of the place of corner 0.
        value_at: numbers of places -> values relative to the level.
    """
    table, count = _table()
    edges = table[case]  # [M, T, 3], -1 = no triangle
    used = torch.arange(table.shape[1]) < count[case][:, None]
    corner_a = torch.tensor([a for a, _ in _EDGES])
    axis = torch.tensor([(a ^ b).bit_length() - 1 for a, b in _EDGES])
    offset = torch.stack([corner_a & 1, corner_a >> 1 & 1, corner_a >> 2], 1)  # [12, 3]
    place = (offset * strides).sum(1)  # [12]
    cell = first[:, None, None].expand_as(edges)[used]  # [F, 3]
    number = edges[used]
    # Three edges start at every place.
    names, faces = torch.unique((cell + place[number]) * 3 + axis[number], return_inverse=True)
    low, high = bounds
    step = torch.tensor([(high - low) / (side - 1) for side in shape])
    start, along = names // 3, names % 3
    a, b = value_at(start), value_at(start + strides[along])
    share = (a / (a - b)).clamp(_MARGIN, 1 - _MARGIN)
    grid = torch.stack([start // strides[0], start // strides[1] % shape[1], start % strides[1]], 1).to(torch.float32)
    grid[torch.arange(len(grid)), along] += share.float()
    vertices = grid * step + low
    return Mesh(vertices, faces.reshape(-1, 3))


@cache
def _table() -> tuple[Tensor, Tensor]:
    """Triangles of every case, [256, T, 3] numbers of edges, and how many of them count [256]."""
    cases = [_case(case) for case in range(256)]
    longest = max(map(len, cases))
    padded = [[*triangles, *[(-1, -1, -1)] * (longest - len(triangles))] for triangles in cases]
    return torch.tensor(padded), torch.tensor([len(triangles) for triangles in cases])


def _case(case: int) -> list[tuple[int, int, int]]:
    number = {frozenset(edge): i for i, edge in enumerate(_EDGES)}
    follows: dict[
        int, int
    ] = {}  # edge -> the next one around an inner corner or several, counter-clockwise seen from outside
    for face in _FACES:
        around = [case >> c & 1 for c in face]
        for i in range(4):
            if around[i] and not around[(i + 1) % 4]:
                # A run of inner corners ends at i and began after j: a line cuts it off from the rest of the face.
                j = i
                while around[j]:
                    j = (j - 1) % 4
                leave = number[frozenset((face[i], face[(i + 1) % 4]))]
                follows[number[frozenset((face[j], face[(j + 1) % 4]))]] = leave
    triangles: list[tuple[int, int, int]] = []
    while follows:
        start = next(iter(follows))
        loop = [start]
        while (after := follows.pop(loop[-1])) != start:
            loop.append(after)
        flat = _triangulated(loop)
        assert flat is not None, case
        triangles += flat
    return triangles


def _triangulated(loop: list[int]) -> list[tuple[int, int, int]] | None:
    """Triangles over a loop of edges whose diagonals do not lie in a face of the cell; None where there are none."""
    if len(loop) < 3:
        return []
    for k in range(1, len(loop) - 1):
        # The triangle of the first, k-th and last edge leaves a loop on either side of it.
        diagonals = [(loop[0], loop[k])] * (k > 1) + [(loop[k], loop[-1])] * (k < len(loop) - 2)
        if any(_share_face(*diagonal) for diagonal in diagonals):
            continue
        before, after = _triangulated(loop[: k + 1]), _triangulated(loop[k:])
        if before is not None and after is not None:
            return [(loop[0], loop[k], loop[-1]), *before, *after]
    return None


def _share_face(one: int, other: int) -> bool:
    return any(set(_EDGES[one]) <= set(face) and set(_EDGES[other]) <= set(face) for face in _FACES)
