"""Softmax attention over chosen blocks of keys: windows of tiles, bands, rows and columns, random blocks, or those that score best."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.block_sparse_attention.op import block_sparse_attention
from genkit.kernels.block_sparse_attention.pattern import BLOCK_SIZES, Pattern, build, random_blocks, top_blocks
from genkit.kernels.block_sparse_attention.rules import Rule, band, everything, line, tile_order, window
from genkit.mixers.grids import grid_of, width_per_head
from genkit.nn.norm import RMSNorm
from genkit.nn.rope import rope_table, rotate

PATTERNS = ("window", "band", "axial", "random", "top")


class BlockSparse(nn.Module):
    """Attention by pattern; queries and keys RMS-normed per head and turned by their coordinates. Padding is never attended to.

    "window"  the `reach` tiles on each side of the query's own along every axis, moved inside at borders (Sliding Tile Attention, 2025)
    "band"    the `reach` tokens on each side in raster order
    "axial"   tokens of the same line along any axis
    "random"  the own block of the sequence and others drawn once per layer, a share `density` of all
    "top"     per block of queries the share `density` of all blocks whose mean keys score best (as MInference, 2024, and Video
              Sparse Attention, 2025), chosen anew at every call

    Args:
        tile: tokens per side of a tile; "window", "random" and "top" take tokens tile by tile, so that blocks are compact.
        block_size: 16, 32, 64 or 128 tokens that are computed together.
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
        pattern: Literal["window", "band", "axial", "random", "top"] = "window",
        reach: int = 1,
        tile: int = 4,
        density: float = 0.25,
        block_size: int = 16,
        rope_base: float = 100.0,
    ):
        super().__init__()
        if pattern not in PATTERNS:
            raise UsageError(f"mixer.pattern={pattern!r} must be one of {', '.join(PATTERNS)}")
        if reach < 0 or tile < 1:
            raise UsageError(f"mixer.reach={reach} must not be negative, mixer.tile={tile} at least 1")
        if not 0 < density <= 1:
            raise UsageError(f"mixer.density={density} must be in (0, 1]")
        if block_size not in BLOCK_SIZES:
            raise UsageError(f"mixer.block_size={block_size} must be one of {', '.join(map(str, BLOCK_SIZES))}")
        self.layer, self.num_heads, self.head_dim = layer, num_heads, width_per_head(dim, num_heads)
        self.pattern, self.reach, self.tile = pattern, reach, tile
        self.density, self.block_size, self.rope_base = density, block_size, rope_base
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid, valid = grid_of(layout, "block_sparse"), layout.valid
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, N, H, K] each
        table = rope_table(layout.coords, self.head_dim, self.rope_base)
        q, k = rotate(self.q_norm(q), table).to(v.dtype), rotate(self.k_norm(k), table).to(v.dtype)
        order, back = _order(grid, 1 if self.pattern in ("band", "axial") else self.tile, x.device)
        q, k, v = (y.index_select(1, order).transpose(1, 2) for y in (q, k, v))  # [B, H, N, K]
        valid = None if valid is None else valid.index_select(1, order)
        o, _ = block_sparse_attention(q, k, v, self.choose(grid, q, k, valid), valid=valid)
        return self.proj(o.transpose(1, 2).flatten(2).index_select(1, back))

    def choose(self, grid: tuple[int, ...], q: Tensor, k: Tensor, valid: Tensor | None) -> Pattern:
        """The pattern of a call, for tokens in tile order."""
        N = math.prod(grid)
        if self.pattern == "top":
            if valid is not None:  # what is at padding has no say
                q, k = (y.masked_fill(~valid[:, None, :, None], 0) for y in (q, k))
            count = max(1, round(self.density * math.ceil(N / self.block_size)))
            return build(N, self.block_size, blocks=top_blocks(q, k, count, self.block_size))
        if self.pattern == "random":
            return _random(N, self.block_size, self.density, self.num_heads, self.layer, q.device)
        return _fixed(self.pattern, grid, self.reach, self.tile, self.block_size, q.device)


@lru_cache(maxsize=64)
def _order(grid: tuple[int, ...], tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens tile by tile, [N], and the way back."""
    with torch.inference_mode(False):
        order = tile_order(grid, [tile] * len(grid))
        return order.to(device), order.argsort().to(device)


@lru_cache(maxsize=64)
def _fixed(name: str, grid: tuple[int, ...], reach: int, tile: int, block_size: int, device: torch.device) -> Pattern:
    with torch.inference_mode(False):
        rule: Rule
        if name == "window":
            tiles = [tile] * len(grid)
            rule = window(grid, [2 * reach + 1] * len(grid), tiles).permuted(tile_order(grid, tiles))
        elif name == "band":
            rule = band(math.prod(grid), reach)
        elif len(grid) == 1:
            rule = everything(grid[0])
        else:
            rule = line(grid, 0)
            for axis in range(1, len(grid)):
                rule = rule | line(grid, axis)
        return build(rule, block_size).to(device)


@lru_cache(maxsize=64)
def _random(
    num_tokens: int, block_size: int, density: float, num_heads: int, seed: int, device: torch.device
) -> Pattern:
    with torch.inference_mode(False):
        blocks = random_blocks(num_tokens, num_tokens, block_size, density, num_heads=num_heads, seed=seed)
        return build(num_tokens, block_size, blocks=blocks).to(device)
