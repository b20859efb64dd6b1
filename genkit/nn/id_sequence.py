"""Ids on a grid as a sequence behind a class token, and back to logits: the two ends of BERT-like generators (MaskGIT, MAGE, AutoNAT, MaskGen)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout
from genkit.nn.context import Context, rows_of
from genkit.nn.dropout import Dropout
from genkit.nn.embed import IdEmbedding, LabelEmbedding

EmbedNorm = Literal["none", "shared", "own"]
Head = Literal["linear", "tied", "tied_detached"]


class IdSequence(nn.Module):
    """ids [B, Q, *grid] in 0 .. S (S = mask) and a label -> [B, 1 + N, D], the class token first.

    Args:
        norm: of the sums of vector and position: "none"; "shared", one layer norm for all; "own", another one for the class token.

    Raises (forward): UsageError for another grid than the trained one, whose positions were never learned.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        num_levels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int,
        norm: EmbedNorm,
        eps: float,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.grid = tuple(grid)
        self.embed = IdEmbedding(num_levels=num_levels, num_rows=codebook_size + 1, dim=dim)
        self.label = LabelEmbedding(num_classes=num_classes, dim=dim)
        nn.init.normal_(self.label.table.weight, std=0.02)  # a token like the others, and of their size
        self.positions = nn.Parameter(0.02 * torch.randn(1 + math.prod(grid), dim))
        self.norm: nn.Module = nn.Identity() if norm == "none" else nn.LayerNorm(dim, eps=eps)
        self.label_norm: nn.Module | None = nn.LayerNorm(dim, eps=eps) if norm == "own" else None
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cond: Cond, layout: Layout, context: Context | None = None) -> Tensor:
        """With a context, places the sequence in it; where it keeps the condition, a light pass has no class token: [B, n, D]."""
        B = len(x)
        if context is not None and context.is_light:
            places = rows_of(self.positions[1:].expand(B, -1, -1), context.of(B))
        else:
            self.check(layout)
            places = self.positions[1:]
        tokens = self.dropout(self.norm(self.embed(x) + places))
        if context is not None:
            context.enter(1, math.prod(self.grid), B)
            if not context.has_condition:
                return tokens
        norm = self.norm if self.label_norm is None else self.label_norm
        label = self.dropout(norm(self.label(cond, B) + self.positions[0]))
        return torch.cat([label.unsqueeze(1), tokens], dim=1)

    def check(self, layout: Layout) -> None:
        if layout.grid != self.grid:
            found = "tokens off a grid" if layout.grid is None else str(tuple(layout.grid))
            raise UsageError(f"the learned positions are for a grid of {self.grid}, found {found}; use that size")


def without_condition(h: Tensor, num: int, context: Context | None) -> Tensor:
    """[B, num + n, D] -> the n tokens, where the condition was computed at all."""
    return h if context is not None and not context.has_condition else h[:, num:]


class IdHead(nn.Module):
    """[..., D] -> logits [..., Q, S].

    Args:
        kind: "linear"; "tied": dense, GELU, layer norm, then products with the vectors of the ids; "tied_detached": whose gradient does not reach those.
        dim: D.
        embed_dim: width of the vectors of the ids.
    """

    def __init__(
        self,
        *,
        kind: Head,
        dim: int,
        embed_dim: int,
        num_levels: int,
        codebook_size: int,
        eps: float,
        gelu: str = "none",
    ):
        super().__init__()
        self.kind, self.num_levels, self.codebook_size = kind, num_levels, codebook_size
        if kind == "linear":
            self.linear = nn.Linear(dim, num_levels * codebook_size)
        else:
            self.dense = nn.Linear(dim, embed_dim)
            self.act = nn.GELU(gelu)
            self.norm = nn.LayerNorm(embed_dim, eps=eps)
            self.bias = nn.Parameter(torch.zeros(num_levels, codebook_size))

    def forward(self, h: Tensor, embed: IdEmbedding) -> Tensor:
        if self.kind == "linear":
            return self.linear(h).unflatten(-1, (self.num_levels, -1))
        vectors = embed.table.weight.unflatten(0, (self.num_levels, -1))[:, : self.codebook_size]  # [Q, S, D]
        if self.kind == "tied_detached":
            vectors = vectors.detach()
        h = self.norm(self.act(self.dense(h)))
        return nn.functional.linear(h, vectors.flatten(0, 1)).unflatten(-1, (self.num_levels, -1)) + self.bias


def on_grid(logits: Tensor, shape: torch.Size) -> Tensor:
    """logits [B, N, Q, S] of ids of this shape [B, Q, *grid] -> [B, Q, *grid, S]."""
    return logits.transpose(1, 2).unflatten(2, shape[2:])


def at_positions(h: Tensor, positions: Tensor | None) -> Tensor:
    """h [B, N, D], or of the tokens with these numbers in the flattened batch, [P, D]."""
    return h if positions is None else h.flatten(0, 1).index_select(0, positions)
