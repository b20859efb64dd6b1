"""Layouts of dense grids."""

from __future__ import annotations

from functools import lru_cache

import torch

from genkit.interfaces import Layout


@lru_cache(maxsize=64)
def dense_layout(grid: tuple[int, ...], device: torch.device | str = "cpu") -> Layout:
    """The layout of a full row-major grid: coords [1, N, A] float32 in units of one token, the first token at 0.

    Equal arguments return the same object, so what is computed from its coordinates once serves every layer and step.
    """
    # Built outside inference mode even when first asked for while sampling: training may keep it for a backward pass.
    with torch.inference_mode(False):
        axes = [torch.arange(size, dtype=torch.float32, device=device) for size in grid]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # [N, A]
        return Layout(coords=coords.unsqueeze(0), grid=grid)
