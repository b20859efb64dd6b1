"""Attention of octree tokens in windows, with positions turned into the heads: the block of OctGPT (Wei et al., 2025, section 3.3).

A token sees its own and shallower depths of its own sample, in its window (nn/octree_places.py).

Differences from `octree-nn/octgpt models/octformer.py`: hidden pairs have no weight at all instead of e^-1000, and attention weights are not dropped in
training (the branches are).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.kernels.octree_attention.op import octree_attention
from genkit.nn.dropout import Dropout
from genkit.nn.norm import RMSNorm
from genkit.nn.octree_places import ROPE_BASE, Light, Places, waves
from genkit.nn.rope import turn_pairs

Kept = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values [N, H, K] of tokens that are finished


class Rotary(nn.Module):
    """Rotary positions whose frequencies are learned per head as vectors in space ("mixed", as in Heo et al., 2024).

    The pairs of a head are three runs of K / 6 magnitudes 100^(-6j/K), each along a direction of its own that is drawn at the start.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        if head_dim % 6:
            raise UsageError(f"rotary positions in space need a head width divisible by 6, found {head_dim}")
        self.num_heads = num_heads
        scale = ROPE_BASE ** (-torch.arange(0, head_dim, 6) / head_dim)  # [K / 6]
        phi = torch.rand(num_heads, 1) * 2 * math.pi
        theta = torch.rand(num_heads, 1) * math.pi / 2
        # Directions as the official code has them: the first two are not at right angles.
        turns = ((theta, phi), (theta, phi + math.pi / 2), (theta + math.pi / 2, phi))
        x = torch.cat([scale * t.sin() * p.cos() for t, p in turns], 1)
        y = torch.cat([scale * t.sin() * p.sin() for t, p in turns], 1)
        z = torch.cat([scale * t.cos() for t, _ in turns], 1)
        self.freqs = nn.Parameter(torch.stack([x, y, z]).flatten(1))  # [3, H K / 2]

    def forward(self, q: Tensor, k: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [N, H, K] turned by their places xyz [N, 3]; channels 2j and 2j + 1 are a pair."""
        angle = (xyz @ self.freqs.float()).unflatten(1, (self.num_heads, -1))  # [N, H, K / 2]
        return turn_pairs(q, angle), turn_pairs(k, angle)


class NodePositions(nn.Module):
    """Vectors added in front of a block: the place of a node, and its depth (the scale embedding).

    Args:
        kind: "waves": fixed sines and cosines of x, then y, then z; "table": a learned row per coordinate, its channels by turns for x, y and z.
        num_places: coordinates per axis.
        num_depths: rows of the scale embedding.
    """

    def __init__(self, dim: int, kind: Literal["waves", "table"], num_places: int, num_depths: int):
        super().__init__()
        if kind == "table" and dim % 3:
            raise UsageError(f"positions=table needs a width divisible by 3, found {dim}")
        self.dim = dim
        self.depth = nn.Embedding(num_depths, dim)
        nn.init.normal_(self.depth.weight, std=0.02)
        self.table: nn.Parameter | None = None
        if kind == "table":
            rows = waves(torch.arange(num_places).float()[:, None].expand(-1, 3), dim)  # [places, 3, channels]
            self.table = nn.Parameter(rows.transpose(1, 2).flatten(1)[:, :dim].contiguous())

    def forward(self, places: Places) -> Tensor:
        """[N, D]."""
        depth = self.depth(places.depths)
        if self.table is None:
            return depth + places.waves(self.dim).to(depth.dtype)
        rows = self.table.unflatten(1, (-1, 3))  # [places, D / 3, 3]
        found = [rows[:, :, axis][places.xyz[:, axis].long()] for axis in range(3)]
        return depth + torch.stack(found, 2).flatten(1)


class OctreeBlock(nn.Module):
    """x + positions, attention in windows, perhaps attention to a condition, and an MLP; norms in front, residuals around.

    Args:
        context_dim: width of the condition's tokens that are attended to; None = no such attention.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window: int,
        dilation: int,
        shift: int,
        norm: Literal["layer", "rms"],
        positions: Literal["waves", "table"],
        num_places: int,
        num_depths: int,
        dropout: float,
        context_dim: int | None = None,
    ):
        super().__init__()
        make = nn.LayerNorm if norm == "layer" else RMSNorm
        self.num_heads, self.window, self.dilation, self.shift = num_heads, window, dilation, shift
        self.positions = NodePositions(dim, positions, num_places, num_depths)
        self.norm1 = make(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rotary = Rotary(num_heads, dim // num_heads)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = make(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), Dropout(dropout), nn.Linear(4 * dim, dim), Dropout(dropout)
        )
        self.dropout = Dropout(dropout)
        self.cross_norm = self.cross = None
        if context_dim is not None:
            self.cross_norm = make(dim)
            self.cross = nn.MultiheadAttention(
                dim, num_heads, dropout=dropout, kdim=context_dim, vdim=context_dim, batch_first=True
            )

    def forward(
        self,
        x: Tensor,
        places: Places,
        context: Tensor | None = None,
        kept: Kept | None = None,
        layer: int = 0,
        light: Light | None = None,
    ) -> Tensor:
        """x [N, D] -> [N, D].

        Args:
            context: [B, L, C], the condition's tokens.
            kept: keys and values of the tokens in places.before, under the number of the layer; those of x are put in under -1 - layer. In a light pass what
                is there belongs to the full one.
            light: x and places are those that ask alone.
        """
        x = x + self.positions(places)
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # [N, H, K]
        q, k = self.rotary(q, k, places.xyz)
        nothing: tuple[Tensor | None, Tensor | None] = (None, None)
        older = nothing if kept is None else kept.get(layer, nothing)
        if light is not None:
            full = nothing if kept is None else kept.get(-1 - layer, nothing)
            asked = light.asked(self.window, self.dilation, self.shift)
            y = asked.attend(q, *(asked.laid(x, f, o) for x, f, o in zip((k, v), full, older, strict=True)))
        else:
            if kept is not None:
                kept[-1 - layer] = (k, v)
            y = self._attend(q, k, v, places, older)
        x = x + self.dropout(self.dropout(self.proj(y.flatten(1))))
        if self.cross is not None and context is not None:
            assert self.cross_norm is not None
            x = x + self._cross(self.cross_norm(x), places, context)
        return x + self.dropout(self.mlp(self.norm2(x)))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, older: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        plan = places.plan(self.window, self.dilation, self.shift)
        y = octree_attention(
            plan.laid(None, (plan.slot, q)),
            plan.laid(older[0], (plan.slot, k)),
            plan.laid(older[1], (plan.slot, v)),
            plan.samples,
            window=self.window,
            dilation=self.dilation,
            shift=plan.shift,
            depth=plan.depths,
        )
        return y[plan.slot]

    def _cross(self, x: Tensor, places: Places, context: Tensor) -> Tensor:
        """Every token attends to the condition of its own sample."""
        assert self.cross is not None
        order = places.samples.argsort(stable=True)
        count = torch.bincount(places.samples, minlength=places.batch_size)
        column = torch.arange(len(order), device=x.device) - (count.cumsum(0) - count)[places.samples[order]]
        rows = x.new_zeros(places.batch_size, int(count.max()), x.shape[1])
        rows[places.samples[order], column] = x[order]
        out = self.cross(rows, context, context, need_weights=False)[0]
        return torch.empty_like(x).index_copy(0, order, out[places.samples[order], column])


class OctreeStack(nn.Module):
    """Blocks by turns without and with dilation, two not moved and two moved by half a window, and a norm behind them."""

    def __init__(
        self,
        *,
        depth: int,
        window: int,
        dilation: int,
        context_dim: int | None = None,
        has_shift: bool = True,
        **options: object,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            OctreeBlock(
                window=window,
                dilation=1 if i % 2 == 0 else dilation,
                shift=window // 2 if has_shift and i // 2 % 2 == 1 else 0,
                context_dim=context_dim if i % 2 == 0 else None,
                **options,  # type: ignore[arg-type]
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(options["dim"]) if options["norm"] == "layer" else RMSNorm(options["dim"])  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        places: Places,
        context: Tensor | None = None,
        kept: Kept | None = None,
        light: Light | None = None,
    ) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, places, context, kept, layer, light)
        return self.norm(x)
