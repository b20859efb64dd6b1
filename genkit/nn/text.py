"""Text as tensors: its bytes, and a small encoder of them that is trained together with what it conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genkit.interfaces import Layout
from genkit.mixers.attention import Attention
from genkit.nn.causal_block import CausalBlock

NUM_BYTES = 256  # rows of the table; 0, which no text holds, is padding


def bytes_of(texts: Sequence[str], length: int) -> Tensor:
    """[B, length] int64 in 0..255: UTF-8, cut off or filled up with 0. An empty text is all 0, and means no text."""
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        encoded = list(text.encode("utf-8").replace(b"\0", b" ")[:length])
        row[: len(encoded)] = torch.tensor(encoded, dtype=torch.int64)
    return rows


class TextEncoder(nn.Module):
    """Bytes [B, T] int64 -> (states [B, T, dim], valid [B, T] bool): a transformer over letters, each of which sees all others of its text.

    Args:
        length: T, the longest text.
    """

    def __init__(self, *, dim: int, depth: int = 2, num_heads: int = 4, length: int = 64):
        super().__init__()
        self.length = length
        self.letter = nn.Embedding(NUM_BYTES, dim)
        self.place = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(
            CausalBlock(dim=dim, mixer=Attention(dim=dim, layer=i, num_heads=num_heads, rope=False))
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        valid = text > 0
        h = self.letter(text) + self.place.weight[: text.shape[1]]
        coords = torch.arange(text.shape[1], device=text.device).view(1, -1, 1).float()
        # A text of nothing attends to its padding, whose states nobody reads.
        layout = Layout(coords=coords, grid=None, valid=valid | ~valid.any(1, keepdim=True))
        for block in self.blocks:
            h = block(h, layout)
        return self.norm(h), valid
