"""Transformer blocks in which every token sees every other: pre-norm as in ViT (Dosovitskiy et al., 2021) and U-ViT (Bao et al., 2023), post-norm as in
BERT (Devlin et al., 2019). They keep their keys and values for light passes (genkit/nn/context.py).

Difference from what was published with these blocks: dropout works on the two residual branches, not on attention weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.nn.context import Context
from genkit.nn.dropout import Dropout
from genkit.nn.mlp import MLP


class SelfAttention(nn.Module):
    """Multi-head attention, x [B, N, D] -> [B, N, D].

    Args:
        layer: under which number keys and values are kept.
        qkv_bias: whether queries, keys and values have biases; the projection behind always has.
    """

    def __init__(self, *, dim: int, layer: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UsageError(f"a width of {dim} is no multiple of the {num_heads} heads of attention")
        self.layer, self.num_heads = layer, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None, context: Context | None = None) -> Tensor:
        """valid [B, N] bool: False is never attended to; with a context, that says so."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, K] each
        if context is not None:
            k, v, valid = context.update(self.layer, k, v)
        mask = None if valid is None else valid[:, None, None, :]
        return self.proj(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and perceptron in residual branches, [B, N, D] -> [B, N, D].

    Args:
        norm: "pre" normalises what a branch is given; "post" the sum of a branch and what it was given.
        eps: of both norms.
        has_skip: forward is given the output of an earlier block, which is joined and projected first (U-ViT).
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm: Literal["pre", "post"] = "pre",
        eps: float = 1e-6,
        gelu: Literal["none", "tanh"] = "none",
        dropout: float = 0.0,
        has_skip: bool = False,
    ):
        super().__init__()
        self.norm = norm
        self.skip = nn.Linear(2 * dim, dim) if has_skip else None
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mixer = SelfAttention(dim=dim, layer=layer, num_heads=num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim=dim, mlp_ratio=mlp_ratio, approximate=gelu)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, context: Context | None = None, skip: Tensor | None = None
    ) -> Tensor:
        if self.skip is not None:
            assert skip is not None
            x = self.skip(torch.cat([x, skip], dim=-1))
        if self.norm == "post":
            x = self.norm1(x + self.dropout(self.mixer(x, valid, context)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.mixer(self.norm1(x), valid, context))
        return x + self.dropout(self.mlp(self.norm2(x)))


def init_normal(module: Any, std: float = 0.02) -> None:
    """Every linear layer and table as in BERT: normal weights, no biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
