"""A small encoder of pictures that is trained together with what they condition: strided convolutions, then a transformer over the cells."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.nn.text import Block


class PictureEncoder(nn.Module):
    """Ink [B, 1, size, size] in [0, 1] -> (states [B, cells^2, dim], whether there is a picture [B] bool). No ink anywhere means no picture; its states have
    no meaning.

    Args:
        size: pixels along a side, cells times a power of 2.
        cells: along a side, of which each becomes a token.
        depth: blocks of the transformer.

    Raises: UsageError for a size that halving does not bring to the cells, and when called, for pictures of another size.
    """

    def __init__(self, *, dim: int, size: int = 64, cells: int = 4, depth: int = 2, num_heads: int = 1):
        super().__init__()
        halvings = (size // cells).bit_length() - 1
        if size != cells << halvings or halvings < 1:
            raise UsageError(f"pictures of {size} pixels in {cells} cells: one must be the other times a power of 2")
        self.size = size
        widths = [1, *(max(8, dim >> i) for i in reversed(range(1, halvings))), dim]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(1, b), nn.GELU())
                for a, b in itertools.pairwise(widths)
            )
        )
        self.place = nn.Embedding(cells * cells, dim)
        self.blocks = nn.ModuleList(Block(dim=dim, num_heads=num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ink: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(ink.shape[1:]) != (1, self.size, self.size):
            raise UsageError(
                f"pictures are {list(ink.shape)}, expected [B, 1, {self.size}, {self.size}] as in training (backbone.picture_size)"
            )
        h = self.convolutions(ink).flatten(2).transpose(1, 2) + self.place.weight  # [B, cells^2, dim]
        for block in self.blocks:
            h = block(h)
        return self.norm(h), torch.any(ink.flatten(1) > 0, dim=1)
