"""A position vector for every place of a dense grid of any size, added to the tokens."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from genkit.errors import UsageError


class GridPositions(nn.Module):
    """grid -> [1, N, dim].

    Args:
        grid: tokens per axis while training.
        kind: "sincos" fixed waves as in DiT (2023); "table" one trained vector per place, which begins as those waves.
        beyond: what "sincos" does with a grid other than the trained one. "stretch" lays it over the trained one, so that the network sees
            coordinates it knows; "continue" keeps one unit per token. A table is always stretched (bicubically, over two axes).
    """

    def __init__(
        self,
        *,
        grid: tuple[int, ...],
        dim: int,
        kind: Literal["sincos", "table"] = "sincos",
        beyond: Literal["stretch", "continue"] = "stretch",
    ):
        super().__init__()
        self.grid, self.dim, self.kind, self.beyond = tuple(grid), dim, kind, beyond
        if kind == "table":
            self.table = nn.Parameter(grid_waves(self.grid, dim).clone())

    def forward(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """Raises UsageError for a number of axes other than the trained one."""
        if len(grid) != len(self.grid):
            raise UsageError(f"positions were trained over {len(self.grid)} axes {self.grid}, found {tuple(grid)}")
        if self.kind == "table":
            return self._resized(grid)
        return grid_waves(tuple(grid), self.dim, None if self.beyond == "continue" else self.grid, device)

    def _resized(self, grid: tuple[int, ...]) -> Tensor:
        if tuple(grid) == self.grid:
            return self.table
        modes = {1: "linear", 2: "bicubic", 3: "trilinear"}
        table = self.table.transpose(1, 2).unflatten(2, self.grid)  # [1, D, *grid]
        return (
            interpolate(table, size=tuple(grid), mode=modes[len(grid)], align_corners=False).flatten(2).transpose(1, 2)
        )


@lru_cache(maxsize=64)
def grid_waves(
    grid: tuple[int, ...], dim: int, trained: tuple[int, ...] | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """[1, N, dim] float32: for every axis, the last one first, sines and then cosines of coordinate * 10000^(-i / count), i = 0 .. count - 1.

    Width that the axes cannot share evenly stays 0. Computed in float64. With `trained`, coordinates are brought onto that grid: centres of
    tokens keep their relative place.

    Raises: UsageError for a dim with no wave for every axis.
    """
    count = dim // (2 * len(grid))
    if count == 0:
        raise UsageError(f"positions over {len(grid)} axes need dim >= {2 * len(grid)}, found {dim}")
    with torch.inference_mode(False), torch.no_grad():  # training may keep what was first asked for while sampling
        frequencies = 10_000 ** -(torch.arange(count, dtype=torch.float64, device="cpu") / count)
        parts = []
        for axis in reversed(range(len(grid))):
            places = torch.arange(grid[axis], dtype=torch.float64, device="cpu")
            if trained is not None and trained[axis] != grid[axis]:
                places = (places + 0.5) * (trained[axis] / grid[axis]) - 0.5
            angles = places[:, None] * frequencies
            waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [length, 2 count]
            shape = [grid[axis] if a == axis else 1 for a in range(len(grid))]
            parts.append(waves.view(*shape, -1).expand(*grid, -1).reshape(math.prod(grid), -1))
        table = nn.functional.pad(torch.cat(parts, dim=-1), (0, dim - 2 * count * len(grid)))
        return table.float().unsqueeze(0).to(device)
