"""Attention within windows of the grid, every other layer with the windows moved by half their size (Swin, 2021)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.grids import grid_of, width_per_head
from genkit.nn.norm import RMSNorm


class Window(nn.Module):
    """Shifted-window attention (Liu et al., "Swin Transformer", ICCV 2021) on grids of num_axes axes.

    Windows of size^A tokens tile the grid; in odd layers the tiling is moved by half a window along every axis that is
    longer than one. Windows that reach over the border are cut there: what the paper gets by rolling the grid round and
    masking what does not belong together. A learned bias per head depends on the offset within the window.
    Queries and keys are RMS-normed per head (ours). Padding is never attended to.

    Args:
        size: tokens per side of a window.
        num_axes: A, of the grids it will work on.
    """

    is_causal = False
    needs_grid = True  # padded or not
    is_resolution_free = True

    def __init__(self, *, dim: int, layer: int, num_heads: int = 4, size: int = 4, num_axes: int = 2):
        super().__init__()
        if size < 1 or num_axes not in (1, 2, 3):
            raise UsageError(f"mixer.size={size} must be at least 1, mixer.num_axes={num_axes} one of 1, 2, 3")
        self.size, self.num_axes, self.is_moved = size, num_axes, layer % 2 == 1
        self.num_heads, self.head_dim = num_heads, width_per_head(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.bias = nn.Parameter(torch.empty(num_heads, (2 * size - 1) ** num_axes))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.offsets: Tensor  # [P, P], which entry of the bias belongs to a pair of a window
        self.register_buffer("offsets", _offsets(size, num_axes), persistent=False)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        B, _, D = x.shape
        grid = grid_of(layout, "window", (self.num_axes,))
        places, origin = windows(grid, self.size, self.size // 2 if self.is_moved else 0, x.device)
        W, P = places.shape
        is_there = places >= 0  # [W, P]
        qkv = self.qkv(x)[:, places.clamp_min(0).flatten()]  # [B, W * P, 3 D]
        q, k, v = qkv.unflatten(1, (W, P)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        q, k, v = (y.transpose(2, 3).flatten(0, 1) for y in (self.q_norm(q), self.k_norm(k), v))  # [B * W, H, P, K]
        mask = self.bias[:, self.offsets]  # [H, P, P]
        if layout.valid is not None or not _is_full(grid, self.size, self.is_moved):
            if layout.valid is None:
                seen = is_there.repeat(B, 1)
            else:
                seen = (is_there & layout.valid[:, places.clamp_min(0)]).flatten(0, 1)  # [B * W, P]
            # Every place sees itself: a row without a key would be NaN.
            allowed = seen[:, None, None, :] | torch.eye(P, dtype=torch.bool, device=x.device)
            mask = mask.masked_fill(~allowed, -math.inf)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        attended = attended.transpose(1, 2).reshape(B, W * P, D)[:, origin]  # [B, N, D]
        return self.proj(attended)


@lru_cache(maxsize=64)
def windows(grid: tuple[int, ...], size: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(places [W, size^A], the number of the token at each place of each window or -1; origin [N], where among the W size^A places a token is).

    Along an axis that is no longer than a window there is one window and no shift.
    """
    with torch.inference_mode(False):
        window, within = torch.zeros(grid, dtype=torch.int64), torch.zeros(grid, dtype=torch.int64)
        total = 1
        for axis, length in enumerate(grid):
            moved = torch.arange(length) + (shift if length > size else 0)
            shape = [-1 if a == axis else 1 for a in range(len(grid))]
            count = int(moved[-1]) // size + 1
            window = window * count + (moved // size).view(shape)
            within = within * size + (moved % size).view(shape)
            total *= count
        num_places = size ** len(grid)
        origin = (window * num_places + within).flatten()
        places = torch.full((total * num_places,), -1)
        places[origin] = torch.arange(math.prod(grid))
        return places.view(total, num_places).to(device), origin.to(device)


def _is_full(grid: tuple[int, ...], size: int, is_moved: bool) -> bool:
    """Whether every place of every window holds a token."""
    return all(length % size == 0 and (length == size or not is_moved or size == 1) for length in grid)


def _offsets(size: int, num_axes: int) -> Tensor:
    """[P, P] number in 0 .. (2 size - 1)^A - 1 of the offset from one place of a window to another."""
    axes = torch.meshgrid(*[torch.arange(size)] * num_axes, indexing="ij")
    number = torch.zeros(size**num_axes, size**num_axes, dtype=torch.int64)
    for axis in axes:
        place = axis.flatten()
        number = number * (2 * size - 1) + place[:, None] - place[None, :] + size - 1
    return number
