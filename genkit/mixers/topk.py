"""Attention between channels, each to its strongest few (DRSformer, 2023): linear in the number of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from genkit.interfaces import Cache, Layout
from genkit.mixers.grids import dense_grid, depthwise, spatially, width_per_head

FRACTIONS = ((1, 2), (2, 3), (3, 4), (4, 5))  # of the channels of a head that each of the four maps keeps


class TopK(nn.Module):
    """Top-k sparse attention of Chen et al., "DRSformer", CVPR 2023, on two-dimensional grids.

    q, k, v = depthwise 3x3 (W x). Per head of K channels, q and k are normalised over the tokens and
    A = tau q k^T [K, K] scores channels against channels. Four maps keep the K/2, 2K/3, 3K/4 and 4K/5 largest scores of
    each row; the output is the learned mixture sum_i a_i softmax_i(A) v, then a projection. Cost O(N D^2 / heads).
    """

    is_causal = False
    needs_grid = True
    is_resolution_free = True

    def __init__(self, *, dim: int, layer: int, num_heads: int = 4):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width_per_head(dim, num_heads)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.conv = depthwise(3 * dim, 3)
        self.proj = nn.Linear(dim, dim)
        self.mixture = nn.Parameter(torch.full((len(FRACTIONS),), 0.2))

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        qkv = spatially(self.conv, self.qkv(x), dense_grid(layout, "topk", (2,)))  # [B, N, 3 D]
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 4, 1).unbind(0)  # [B, H, K, N]
        scores = normalize(q, dim=-1) @ normalize(k, dim=-1).transpose(-2, -1) * self.temperature  # [B, H, K, K]
        ranked = scores.sort(dim=-1, descending=True).indices
        weights = torch.zeros_like(scores)
        for share, (part, whole) in zip(self.mixture, FRACTIONS, strict=True):
            kept = ranked[..., : max(1, self.head_dim * part // whole)]
            is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
            weights = weights + share * scores.masked_fill(~is_kept, -math.inf).softmax(-1)
        mixed = (weights @ v).permute(0, 3, 1, 2).flatten(2)  # [B, N, D]
        return self.proj(mixed)
