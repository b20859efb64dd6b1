"""Attention along one axis of the grid at a time, the outputs of all axes summed or one axis per layer (Ho et al., 2019)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.grids import grid_of, width_per_head
from genkit.nn.norm import RMSNorm
from genkit.nn.rope import rope_table, rotate


class Axial(nn.Module):
    """Axial attention (Ho et al., "Axial Attention in Multidimensional Transformers", 2019): O(N (Y + X) D) on an image.

    Queries, keys and values are shared by the axes (ours: the paper has weights per axis) and turned by the coordinates.
    Padding is never attended to.

    Args:
        combine: "sum" attends along every axis and adds; "alternate" along axis (layer mod A) alone.
    """

    is_causal = False
    needs_grid = True  # padded or not
    is_resolution_free = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int = 4,
        combine: Literal["sum", "alternate"] = "sum",
        rope_base: float = 100.0,
    ):
        super().__init__()
        if combine not in ("sum", "alternate"):
            raise UsageError(f"mixer.combine={combine!r} must be sum or alternate")
        self.layer, self.num_heads, self.head_dim = layer, num_heads, width_per_head(dim, num_heads)
        self.combine, self.rope_base = combine, rope_base
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid = grid_of(layout, "axial")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, N, H, K] each
        table = rope_table(layout.coords, self.head_dim, self.rope_base)
        q, k = rotate(self.q_norm(q), table).to(v.dtype), rotate(self.k_norm(k), table).to(v.dtype)
        axes = range(len(grid)) if self.combine == "sum" else [self.layer % len(grid)]
        attended = sum(self.along(axis, grid, q, k, v, layout.valid) for axis in axes)
        return self.proj(attended)

    def along(self, axis: int, grid: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """q, k, v [B, N, H, K] -> [B, N, D], each token attending to those that differ from it in this axis alone."""

        def lines(y: Tensor) -> Tensor:
            """[B, N, ...] -> [B * lines, n, ...]"""
            return y.unflatten(1, grid).movedim(1 + axis, len(grid)).reshape(-1, grid[axis], *y.shape[2:])

        mask = None
        if valid is not None:
            itself = torch.eye(grid[axis], dtype=torch.bool, device=q.device)
            mask = lines(valid)[:, None, None, :] | itself  # [B * lines, 1, n, n]
        q, k, v = (lines(y).transpose(1, 2) for y in (q, k, v))  # [B * lines, H, n, K]
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        others = [size for a, size in enumerate(grid) if a != axis]
        return attended.unflatten(0, (-1, *others)).movedim(len(grid), 1 + axis).flatten(1, len(grid))
