"""A watertight mesh around any heap of triangles: the outside of a thin shell (as mesh2sdf, Wang et al. 2022, "Dual octree graph networks", section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.meshes.hierarchy import Hierarchy
from genkit.meshes.marching_cubes import marching_cubes
from genkit.meshes.mesh import Mesh

_COARSE = 8  # cells per side of the blocks that are looked at as a whole


def repaired(mesh: Mesh, resolution: int = 96, thickness: float = 1.0) -> Mesh:
    """The surface that lies `thickness` outside of the triangles, as seen from outside.

    Everything within that distance of a triangle becomes solid, and so does every hollow that cannot be reached from outside. Thin sheets become plates,
    holes narrower than twice the thickness close, and the whole grows by the thickness on every side.

    Args:
        mesh: within [-1, 1] by a margin of the thickness.
        resolution: cells per axis of the grid over [-1, 1]^3.
        thickness: in cells, at least 0.87 (half a cell's diagonal): less lets the outside leak in.

    Returns: a watertight mesh that looks outwards. Raises ValueError for a thickness that leaks.
    """
    if thickness < 0.87:
        raise ValueError(f"a shell of {thickness} cells has gaps; use at least 0.87")
    cell = 2 / resolution
    level = thickness * cell
    distance = _near(Hierarchy(mesh), resolution, level + 2 * cell)
    outside = reachable(distance > level)
    values = torch.where(outside, distance - level, -(distance - level).abs().clamp_min(1e-3 * cell))
    padded = torch.nn.functional.pad(values, (1,) * 6, value=cell)
    return marching_cubes(padded, bounds=(-1 - cell, 1 + cell))


def _near(tree: Hierarchy, resolution: int, reach: float) -> Tensor:
    """Distances at the corners of cells, [resolution + 1]^3; never more than `reach`, which stands for everything beyond."""
    side = resolution + 1
    blocks = -(-side // _COARSE)
    cell = 2 / resolution
    middle = (torch.arange(blocks) * _COARSE + (_COARSE - 1) / 2) * cell - 1
    far, _ = tree.closest(torch.cartesian_prod(middle, middle, middle))
    around = (_COARSE - 1) / 2 * 3**0.5 * cell
    kept = (far <= around + reach).nonzero()[:, 0]
    values = torch.full((blocks**3, _COARSE**3), reach)
    local = torch.arange(_COARSE)
    offsets = torch.cartesian_prod(local, local, local)
    corner = torch.stack([kept // blocks**2, kept // blocks % blocks, kept % blocks], 1) * _COARSE
    places = (corner[:, None] + offsets).reshape(-1, 3) * cell - 1
    if len(places):
        values[kept] = tree.closest(places, within=reach)[0].clamp_max(reach).reshape(-1, _COARSE**3)
    grid = values.reshape(blocks, blocks, blocks, _COARSE, _COARSE, _COARSE).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape((blocks * _COARSE,) * 3)[:side, :side, :side].contiguous()


def reachable(free: Tensor) -> Tensor:
    """Which free cells can be reached from the border of a grid through free cells side by side: [X, Y, Z] bool -> the same."""
    reached = torch.zeros_like(free)
    for axis in range(3):
        for end in (0, -1):
            reached.select(axis, end).copy_(free.select(axis, end))
    before = -1
    while (now := int(reached.sum())) != before:
        before = now
        for axis in range(3):
            # Along a line, whole runs of free cells are reached at once.
            lines, along = free.movedim(axis, -1), reached.movedim(axis, -1)
            run = (~lines).cumsum(-1)
            found = torch.zeros((*run.shape[:-1], run.shape[-1] + 1), dtype=torch.uint8)
            found = found.scatter_reduce(-1, run, along.to(torch.uint8), "amax").bool()
            reached = (found.gather(-1, run) & lines).movedim(-1, axis)
    return reached
