"""Layouts of dense grids, and of batches whose samples have sizes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

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


def padded_layout(grid: tuple[int, ...], sizes: Tensor) -> Layout:
    """The layout of samples in the first corner of a grid, sizes [B, A] cells each. Where all fill the grid, it is the dense one."""
    dense = dense_layout(grid, device=sizes.device)
    if bool((sizes == torch.tensor(grid, device=sizes.device)).all()):
        return dense
    valid = (dense.coords < sizes.unsqueeze(1)).all(-1)  # [B, N]
    return Layout(coords=dense.coords, grid=grid, valid=valid)


def sizes_of(layout: Layout) -> Tensor | None:
    """Cells along every axis of each sample, [B, A] int64; None where nothing is padded."""
    if layout.valid is None:
        return None
    return torch.where(layout.valid.unsqueeze(-1), layout.coords + 1, 0).amax(1).long()


def rows_of_one_size(sizes: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every distinct size of sizes [B, A], with the numbers of its rows [n] int64."""
    distinct, which = sizes.unique(dim=0, return_inverse=True)
    for number, size in enumerate(distinct.tolist()):
        yield tuple(size), (which == number).nonzero().squeeze(1)
