"""Text as tensors: its bytes, and a small encoder of them that is trained together with what it conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genkit.nn.cross_attention import CrossAttention
from genkit.nn.mlp import MLP

NUM_BYTES = 256  # rows of the table; 0, which no text holds, is padding


def bytes_of(texts: Sequence[str], length: int) -> Tensor:
    """[B, length] int64 in 0..255: UTF-8, cut off or filled up with 0. An empty text is all 0, and means no text."""
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        encoded = list(text.encode("utf-8").replace(b"\0", b" ")[:length])
        row[: len(encoded)] = torch.tensor(encoded, dtype=torch.int64)
    return rows


class Block(nn.Module):
    """Every token attends to all real ones of its sample, then a perceptron; a layer norm before each."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim=dim, context_dim=dim, num_heads=num_heads)
        self.mlp = MLP(dim=dim, mlp_ratio=4.0)

    def forward(self, h: Tensor, valid: Tensor | None = None) -> Tensor:
        normed = self.attention_norm(h)
        h = h + self.attention(normed, normed, valid)
        return h + self.mlp(self.mlp_norm(h))


class TextEncoder(nn.Module):
    """Bytes [B, T] int64 -> (states [B, T, dim], valid [B, T] bool): a transformer over letters. What stands at padding has no meaning.

    Args:
        length: T, the longest text.
    """

    def __init__(self, *, dim: int, depth: int = 2, num_heads: int = 1, length: int = 64):
        super().__init__()
        self.length = length
        self.letter = nn.Embedding(NUM_BYTES, dim)
        self.place = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim=dim, num_heads=num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        valid = text > 0
        h = self.letter(text) + self.place.weight[: text.shape[1]]
        for block in self.blocks:
            h = block(h, valid)
        return self.norm(h), valid
