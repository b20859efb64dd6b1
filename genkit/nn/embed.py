"""Embeddings of ids, labels and grid positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout


class IdEmbedding(nn.Module):
    """ids [B, Q, *grid] in 0 .. num_rows - 1 -> [B, N, D]: one table per level, summed over the levels."""

    def __init__(self, *, num_levels: int, num_rows: int, dim: int):
        super().__init__()
        self.num_rows = num_rows
        self.table = nn.Embedding(num_levels * num_rows, dim)
        nn.init.normal_(self.table.weight, std=0.02)
        self.first_row: Tensor
        self.register_buffer("first_row", num_rows * torch.arange(num_levels)[:, None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.flatten(2) + self.first_row  # [B, Q, N]
        if rows.shape[1] == 1:
            return self.table(rows.squeeze(1))
        return self.table(rows).sum(1)


class LabelEmbedding(nn.Module):
    """cond["label"] [B] int64 -> [B, D]; -1, and a condition without labels, is the null class in the last row.

    Args:
        null_class: whether there is that row. Without it, as in weights that were trained without dropping labels, -1 raises UsageError.
    """

    def __init__(self, *, num_classes: int, dim: int, null_class: bool = True):
        super().__init__()
        self.num_classes, self.null_class = num_classes, null_class
        # Unit variance: this vector is the only input of the modulation. At the 0.02 of DiT, where it is added to a time
        # embedding, the class has hardly any effect on the first thousand steps.
        self.table = nn.Embedding(num_classes + int(null_class), dim)

    def forward(self, cond: Cond, batch_size: int) -> Tensor:
        label = cond.get("label")
        if label is None:
            label = torch.full((batch_size,), -1, dtype=torch.int64, device=self.table.weight.device)
        if not self.null_class and bool((label < 0).any()):
            raise UsageError(
                'this network was trained without dropping labels and knows no null class: give every sample a label, and draw with "guidance" 1'
            )
        return self.table(torch.where(label < 0, self.num_classes, label))


class PositionEmbedding(nn.Module):
    """One learned vector per place of the grid; a layout without a grid picks places by its coordinates.

    Raises UsageError for a grid other than the trained one: its places were never learned.
    """

    def __init__(self, *, grid: tuple[int, ...], dim: int):
        super().__init__()
        self.grid = tuple(grid)
        self.table = nn.Parameter(torch.randn(math.prod(grid), dim) * 0.02)

    def forward(self, layout: Layout) -> Tensor:
        """[1 or B, N, D]."""
        if layout.grid == self.grid:
            return self.table.unsqueeze(0)
        if layout.grid is not None:
            raise UsageError(
                f"the learned positions are for a grid of {self.grid}, found {tuple(layout.grid)}; "
                "use that size, or train with backbone.positions=sincos"
            )
        strides = [math.prod(self.grid[axis + 1 :]) for axis in range(len(self.grid))]
        place = (layout.coords.long() * torch.tensor(strides, device=layout.coords.device)).sum(-1)  # [B, N]
        return nn.functional.embedding(place, self.table)


class SincosPositions(nn.Module):
    """Fixed sines and cosines of the coordinates, as in DiT (2023), on any grid.

    A grid of another size is stretched onto the trained one: the network then sees coordinates it was trained on.
    """

    def __init__(self, *, grid: tuple[int, ...], dim: int):
        super().__init__()
        if dim < 2 * len(grid):
            raise UsageError(f"positions over {len(grid)} axes need dim >= {2 * len(grid)}, found {dim}")
        self.grid, self.dim = tuple(grid), dim

    def forward(self, layout: Layout) -> Tensor:
        """[1 or B, N, D]."""
        coords = layout.coords
        if layout.grid is not None and layout.grid != self.grid:
            ratio = torch.tensor([a / b for a, b in zip(self.grid, layout.grid, strict=True)], device=coords.device)
            coords = (coords + 0.5) * ratio - 0.5  # centres of tokens keep their relative place
        num_freqs = self.dim // (2 * coords.shape[-1])
        freqs = 10000 ** -(torch.arange(num_freqs, dtype=torch.float32, device=coords.device) / num_freqs)
        angles = (coords.float().unsqueeze(-1) * freqs).flatten(-2)  # [B, N, A * num_freqs]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return nn.functional.pad(waves, (0, self.dim - waves.shape[-1]))
