"""Attention whose scores fall with the Manhattan distance on the grid (RMT, 2024), whole or along rows and then columns."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.retention.manhattan import manhattan
from genkit.mixers.grids import dense_grid, depthwise, spatially, width_per_head
from genkit.nn.rope import turn_pairs


class RMT(nn.Module):
    """Manhattan self-attention (Fan et al., "RMT: Retentive Networks Meet Vision Transformers", CVPR 2024), two axes.

    softmax(q k^T / sqrt(K) + (|dy| + |dx|) log gamma_h) v + depthwise 5x5 of v, with gamma_h = 1 - 2^(-first - spread h / H):
    later heads look further. Queries and keys are turned by their raster number, channels pairwise. "decomposed"
    attends along the rows and then, with the same queries and keys, along the columns: O(N (Y + X) D), not equal to the whole.

    Args:
        form: "whole" or "decomposed".
        first, spread: of the decays; the published models use 2 and 4 or 6.
    """

    is_causal = False
    needs_grid = True
    is_resolution_free = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int = 4,
        form: Literal["whole", "decomposed"] = "whole",
        first: float = 2.0,
        spread: float = 4.0,
    ):
        super().__init__()
        if form not in ("whole", "decomposed"):
            raise UsageError(f"mixer.form={form!r} must be whole or decomposed")
        self.num_heads, self.head_dim, self.form = num_heads, width_per_head(dim, num_heads), form
        if self.head_dim % 2:
            raise UsageError(
                f"mixer.num_heads={num_heads}: the width per head {self.head_dim} must be even to be turned"
            )
        if first <= 0 or spread < 0:
            raise UsageError(f"mixer.first={first} must be positive, mixer.spread={spread} not negative")
        self.qkv = nn.Linear(dim, 3 * dim)
        nn.init.xavier_uniform_(self.qkv.weight, gain=2**-2.5)  # as published
        self.local = depthwise(dim, 5)
        self.proj = nn.Linear(dim, dim)
        self.log_decay: Tensor  # [H]
        decay = 1 - 2 ** (-first - spread * torch.arange(num_heads, dtype=torch.float32) / num_heads)
        self.register_buffer("log_decay", decay.log(), persistent=False)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid = dense_grid(layout, "rmt", (2,))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        local = spatially(self.local, v, grid)  # [B, N, D]
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (q, k, v))  # [B, N, H, K] each
        decay = self.log_decay.to(torch.promote_types(q.dtype, torch.float32))
        attended = manhattan(self.turn(q), self.turn(k), v, decay, (grid[0], grid[1]), self.form == "decomposed")
        return self.proj(attended.flatten(2) + local)

    def turn(self, x: Tensor) -> Tensor:
        """x [B, N, H, K], channels (2i, 2i + 1) of token n turned by n 10000^(-i / (K / 2 - 1))."""
        _, N, _, K = x.shape
        rates = 10_000.0 ** -torch.linspace(0, 1, K // 2, device=x.device, dtype=torch.float32)
        angles = torch.arange(N, device=x.device).view(-1, 1, 1) * rates  # [N, 1, K / 2]
        return turn_pairs(x, angles)
