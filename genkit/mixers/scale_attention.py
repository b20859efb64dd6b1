"""Attention of tokens on grids that grow: each sees its own scale and the coarser ones.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (VAR), NeurIPS 2024; behaviour as in
FoundationVision/VAR models/basic_var.py SelfAttention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.attention import KeysValues
from genkit.mixers.grids import width_per_head

_LARGEST = math.log(100)  # of the learned logarithm of the sharpness


class ScaleAttention(nn.Module):
    """x [B, N, D] -> [B, N, D]. The first coordinate of a token is the number of its scale; tokens come scale after scale.

    With a cache that has an entry "num_tokens", x are whole scales, the next ones: keys and values of earlier calls are kept as by a causal mixer.

    Args:
        dim: D, divisible by num_heads.
        layer: number of the layer, the key in a cache.
        cosine: queries and keys have length 1, and every head learns how sharply it looks. Without, logits are a quarter of the usual, as in the
            released code.
    """

    is_causal = False  # tokens of one scale see each other
    needs_grid = False
    is_resolution_free = True
    undecayed = ("log_scale",)  # as published

    def __init__(self, *, dim: int, layer: int, num_heads: int = 4, cosine: bool = True):
        super().__init__()
        self.layer, self.num_heads, self.head_dim = layer, num_heads, width_per_head(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(4))) if cosine else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        if layout.valid is not None:
            raise UsageError("mixer.type=scale_attention: scales of an image are whole; padding is not supported")
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, K] each
        scale = 0.25 / math.sqrt(self.head_dim)
        if self.log_scale is not None:
            q, k, scale = normalize(q, dim=-1) * self.log_scale.clamp_max(_LARGEST).exp(), normalize(k, dim=-1), 1.0
            q, k = q.to(v.dtype), k.to(v.dtype)  # the norm runs in float32 under autocast
        before = 0
        if cache is not None and "num_tokens" in cache:
            before, k, v, _ = cache.setdefault(self.layer, KeysValues(cache["num_tokens"])).append(k, v)
        number = layout.coords[..., 0]  # [B or 1, N]
        mask = (number[:, :, None] >= number[:, None, :]).unsqueeze(1)  # [B or 1, 1, N, N]
        mask = torch.nn.functional.pad(mask, (before, 0), value=True)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(attended.transpose(1, 2).flatten(2))
