"""Attention as a recurrence (2024): one learned query per head attends to all tokens so far; causal, a state of one vector per head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from genkit.interfaces import Cache, Layout
from genkit.kernels.aaren.op import aaren
from genkit.mixers.grids import width_per_head


class Aaren(nn.Module):
    """Feng et al., "Attention as an RNN", 2024, section 3: o_t = sum_{j <= t} softmax_j(q . k_j / sqrt(K)) v_j, then a projection.

    The query is a parameter and no function of the token: what it asks for is the same everywhere, which suits running summaries. Padding
    is never attended to.
    """

    is_causal = True
    needs_grid = False
    is_resolution_free = True

    def __init__(self, *, dim: int, layer: int, num_heads: int = 4):
        super().__init__()
        self.layer, self.num_heads, self.head_dim = layer, num_heads, width_per_head(dim, num_heads)
        self.query = nn.Parameter(torch.randn(num_heads, self.head_dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)  # [B, N, H, K] each
        scores = (k * self.query).sum(-1) * self.head_dim**-0.5  # [B, N, H]
        if layout.valid is not None:
            scores = scores.masked_fill(~layout.valid.unsqueeze(-1), -torch.inf)
        before = None if cache is None else cache.get(self.layer)
        o, state = cast(
            "tuple[Tensor, tuple[Tensor, Tensor]]", aaren(scores.to(v.dtype), v, state=before, return_state=True)
        )
        if cache is not None:
            cache[self.layer] = tuple(s.detach() for s in state)
        return self.proj(o.flatten(2))
