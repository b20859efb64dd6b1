"""Retention (RetNet, 2023; on image tokens ViR, 2023): linear attention that forgets at a fixed rate per head; causal."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import silu

from genkit.interfaces import Cache, Layout
from genkit.kernels.retention.causal import retention
from genkit.mixers.grids import width_per_head
from genkit.nn.linear_map import Projection
from genkit.nn.norm import RMSNorm
from genkit.nn.rope import rope_table, rotate


class Retention(nn.Module):
    """o_t = sum_{s <= t} gamma_h^(t - s) (q_t . k_s) / sqrt(K) v_s, gamma_h = 1 - 2^(-5 - h) (Sun et al., "Retentive Network", 2023).

    Normed per head and gated, W_o(RMSNorm(o) silu(W_g x)), as in its code; queries and keys are turned by their coordinates on the
    grid, where text models use their number. On raster tokens it is the mixer of Hatamizadeh et al., "ViR", 2023, whose
    code was not released. What is at padding is not read, but counts as time.
    """

    is_causal = True
    needs_grid = False
    is_resolution_free = True

    def __init__(self, *, dim: int, layer: int, num_heads: int = 4, rope_base: float = 100.0):
        super().__init__()
        self.layer, self.num_heads, self.head_dim = layer, num_heads, width_per_head(dim, num_heads)
        self.rope_base = rope_base
        self.qkv, self.g_proj = Projection(dim, 3 * dim), Projection(dim, dim)
        self.norm = RMSNorm(self.head_dim)
        self.o_proj = Projection(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, N, H, K] each
        table = rope_table(layout.coords, self.head_dim, self.rope_base)
        q, k = rotate(q, table).to(v.dtype), rotate(k, table).to(v.dtype)
        if layout.valid is not None:
            k = k.masked_fill(~layout.valid[:, :, None, None], 0)
        before = None if cache is None else cache.get(self.layer)
        o, state = cast("tuple[Tensor, Tensor]", retention(q, k, v, initial_state=before, return_state=True))
        if cache is not None:
            cache[self.layer] = state.detach()
        return self.o_proj((self.norm(o) * silu(self.g_proj(x)).unflatten(-1, (self.num_heads, -1))).flatten(2))
