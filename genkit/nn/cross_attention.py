"""Attention of tokens to what they are conditioned on: neighbours, or the letters of a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError


class CrossAttention(nn.Module):
    """x [B, N, dim], context [B, k, context_dim] -> [B, N, dim]. The order of the context does not matter, and k may be any number.

    Args:
        num_heads: divides dim.

    Raises: UsageError for a width that heads do not divide.
    """

    def __init__(self, *, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise UsageError(
                f"backbone.dim={dim} is not divided by the {num_heads} heads of the attention to the context"
            )
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Args:
            valid: [B, k] bool, False = padding. A sample without anything valid gets what attention to nothing gives, 0.
        """
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if valid is None:
            return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        is_any = valid.any(1)[:, None, None]  # [B, 1, 1]
        mask = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return torch.where(is_any, self.proj(found), 0.0)
