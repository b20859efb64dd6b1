"""Attention of octree tokens in windows, with positions turned into the heads: the block of OctGPT (Wei et al., 2025, section 3.3).

A sample's tokens stand in a row, depth after depth and in z-order within; a window holds `window` of them, next to each other or `dilation` apart, in
some blocks moved by half a window. A token sees its own and shallower depths of its own sample. Tokens that can never see what comes later - those of
finished depths - need not be computed again: their keys and values are kept, and only windows with new tokens are looked at. A light pass computes a few
tokens anew and takes the keys and values of all others from the last full one (`Light`).

Differences from `octree-nn/octgpt models/octformer.py`: hidden pairs have no weight at all instead of e^-1000, and attention weights are not dropped in
training (the branches are).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.kernels.octree_attention.op import octree_attention
from genkit.nn.dropout import Dropout
from genkit.nn.norm import RMSNorm
from genkit.octree.octree import Octree

ROPE_BASE = 100.0
Kept = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values [N, H, K] of tokens that are finished


@dataclass
class Places:
    """Where tokens stand.

    Attributes:
        samples: [N] int64.
        depths: [N] int64, from the first depth that has tokens.
        xyz: [N, 3] float, centre of the node in units of the finest position.
        batch_size: B.
        is_aligned: every sample's first token begins a window, so that what becomes of it does not depend on the others in the batch; else windows run on
            through the batch, as in the official code.
        is_stable: keeps depth order and z-order within a sample. The official code asks for no order among equals; on a GPU it gets this one, on a CPU
            another one that no model was trained with.
        before: places of the tokens whose keys and values are kept; they precede these in every sample.
    """

    samples: Tensor
    depths: Tensor
    xyz: Tensor
    batch_size: int
    is_aligned: bool
    is_stable: bool = True
    before: Places | None = None
    _plans: dict[tuple[int, int, int], Plan] = field(default_factory=dict, repr=False)
    _waves: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def counts(self) -> Tensor:
        """[B] int64, tokens of each sample, kept ones included."""
        own = torch.bincount(self.samples, minlength=self.batch_size)
        return own if self.before is None else own + self.before.counts

    @cached_property
    def slots(self) -> Tensor:
        """[N] int64: number of the token in the row of its sample, behind the kept ones; where windows run on, in the row of the batch."""
        order = self.samples.argsort(stable=True) if self.is_stable else self.samples.sort().indices
        own = torch.bincount(self.samples, minlength=self.batch_size)
        rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        if not self.is_aligned:
            return rank
        first = own.cumsum(0) - own
        rank = rank - first[self.samples]
        return rank if self.before is None else rank + self.before.counts[self.samples]

    def select(self, chosen: Tensor) -> Places:
        """Some of the tokens, by a mask or by numbers."""
        return Places(
            self.samples[chosen],
            self.depths[chosen],
            self.xyz[chosen],
            self.batch_size,
            self.is_aligned,
            self.is_stable,
            self.before,
        )

    def followed_by(self, others: Places) -> Places:
        """These and others behind them, as one row per sample."""
        return Places(
            torch.cat([self.samples, others.samples]),
            torch.cat([self.depths, others.depths]),
            torch.cat([self.xyz, others.xyz]),
            self.batch_size,
            self.is_aligned,
            self.is_stable,
            self.before,
        )

    def waves(self, dim: int) -> Tensor:
        """[N, dim], see `waves`; made once for all blocks."""
        if dim not in self._waves:
            self._waves[dim] = waves(self.xyz, dim).flatten(1)[:, :dim]
        return self._waves[dim]

    def plan(self, window: int, dilation: int, shift: int) -> Plan:
        """Who stands in which window; made once for all blocks of a kind."""
        kind = (window, dilation, shift)
        if kind not in self._plans:
            self._plans[kind] = _plan(self, *kind)
        return self._plans[kind]


@dataclass(frozen=True)
class Plan:
    """Windows laid out in a row of `length` slots, `shift` of which more stand in front.

    Attributes:
        slot: [N], of the tokens.
        kept: [P] which of the kept tokens share a window with them, and kept_slot [P] where these stand.
        samples, depths: [length], of the slots; fillers belong to a sample of their own.
    """

    length: int
    shift: int
    slot: Tensor
    kept: Tensor | None
    kept_slot: Tensor | None
    samples: Tensor
    depths: Tensor


def _plan(places: Places, window: int, dilation: int, shift: int) -> Plan:
    slots, samples, before = places.slots, places.samples, places.before
    if not places.is_aligned:
        order = torch.empty_like(slots).index_copy_(0, slots, torch.arange(len(slots), device=slots.device))
        return Plan(len(slots), shift, slots, None, None, samples[order], places.depths[order])
    group = window * dilation
    count = places.counts
    done = torch.zeros_like(count) if before is None else before.counts
    # The group of windows that the first new token of a sample stands in; what lies before it is seen by nobody new.
    start = (done + shift) // group * group - shift
    length = torch.where(count > done, -(-(count - start) // group) * group, 0)
    offset = length.cumsum(0) - length - start
    slot = slots + offset[samples]
    kept = kept_slot = None
    total = int(length.sum())
    ids = torch.full((total,), places.batch_size, dtype=torch.int64, device=slots.device).index_copy_(0, slot, samples)
    depths = torch.zeros_like(ids).index_copy_(0, slot, places.depths)
    if before is not None:
        rank = before.slots
        kept = ((rank >= start[before.samples]) & (count > done)[before.samples]).nonzero().squeeze(1)
        kept_slot = (rank + offset[before.samples])[kept]
        ids.index_copy_(0, kept_slot, before.samples[kept])
        depths.index_copy_(0, kept_slot, before.depths[kept])
    return Plan(total, 0, slot, kept, kept_slot, ids, depths)


@dataclass
class Light:
    """A light pass: a few tokens ask, and see the others as the last full pass saw them (Liu et al., "ReCAP", 2025).

    Attributes:
        places: of all tokens, those that ask and those that are only seen.
        chosen: [n] int64, numbers of those that ask.
        at: numbers of the tokens of the full pass, None = all; what it computed for those that ask is not used.
    """

    places: Places
    chosen: Tensor
    at: Tensor | None
    _asked: dict[tuple[int, int, int], Asked] = field(default_factory=dict, repr=False)

    def asked(self, window: int, dilation: int, shift: int) -> Asked:
        """Which windows those that ask stand in; made once for all blocks of a kind."""
        kind = (window, dilation, shift)
        if kind not in self._asked:
            self._asked[kind] = _asked(self.places.plan(*kind), self, window, dilation)
        return self._asked[kind]


@dataclass(frozen=True)
class Asked:
    """The windows of a light pass.

    Attributes:
        plan: of all tokens.
        own, full: slots of those that ask, and of the tokens of the full pass.
        keys: [W, window], slots of the windows that somebody asks in.
        queries: [W, m], numbers among those that ask; a window with fewer than m has its first one several times.
        seen: [W, 1, m, window] bool.
        window, column: [n], where the answer to each stands.
    """

    plan: Plan
    own: Tensor
    full: Tensor
    keys: Tensor
    queries: Tensor
    seen: Tensor
    window: Tensor
    column: Tensor

    def laid(self, own: Tensor, full: Tensor | None, older: Tensor | None) -> Tensor:
        """[length, ...] in slots, of those that ask, of the full pass, and of what is kept of finished depths."""
        passed = [] if full is None else [(self.full, full)]
        return _laid(self.plan, older, *passed, (self.own, own))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n, H, K] of those that ask, k and v [length, H, K] in slots -> [n, H, K]."""
        q, k, v = (x[at].transpose(1, 2) for x, at in ((q, self.queries), (k, self.keys), (v, self.keys)))
        return scaled_dot_product_attention(q, k, v, attn_mask=self.seen).transpose(1, 2)[self.window, self.column]


def _asked(plan: Plan, light: Light, window: int, dilation: int) -> Asked:
    slot, group = plan.slot[light.chosen], window * dilation
    full = plan.slot if light.at is None else plan.slot[light.at]
    used, own = (slot // group * dilation + slot % dilation).unique(return_inverse=True)
    keys = (used // dilation * group + used % dilation)[:, None] + dilation * torch.arange(window, device=slot.device)
    count = torch.bincount(own, minlength=len(used))
    order = own.argsort(stable=True)
    first = count.cumsum(0) - count
    column = torch.empty_like(order)
    column[order] = torch.arange(len(order), device=order.device) - first[own[order]]
    queries = order[first][:, None].repeat(1, int(count.max()))
    queries[own, column] = torch.arange(len(order), device=order.device)
    of_query = slot[queries]
    seen = plan.samples[of_query][:, :, None] == plan.samples[keys][:, None]
    seen &= plan.depths[of_query][:, :, None] >= plan.depths[keys][:, None]
    return Asked(plan, slot, full, keys, queries, seen[:, None], own, column)


def places_of(octree: Octree, depths: range, *, max_depth: int, first_depth: int, is_aligned: bool) -> Places:
    """Places of all nodes of some depths, depth after depth.

    Args:
        max_depth: the deepest depth there will be; positions are counted in halves of its nodes, 2^(max_depth + 1) along a side.
        first_depth: the depth counted as 0.
    """
    xyz = []
    for d in depths:
        side = 2 ** (max_depth + 1) // 2**d
        xyz.append(octree.xyz(d) * side + side // 2)
    return Places(
        torch.cat([octree.samples(d) for d in depths]),
        torch.cat([torch.full_like(octree.keys[d], d - first_depth) for d in depths]),
        torch.cat(xyz).float(),
        octree.batch_size,
        is_aligned,
    )


def in_front(count: int, places: Places) -> Places:
    """Places of `count` tokens per sample that hold the condition: depth 0, at the corner of the box."""
    device = places.samples.device
    samples = torch.arange(places.batch_size, device=device).repeat_interleave(count)
    return Places(
        samples,
        torch.zeros_like(samples),
        torch.zeros(len(samples), 3, device=device),
        places.batch_size,
        places.is_aligned,
        places.is_stable,
    )


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
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


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


def waves(xyz: Tensor, dim: int) -> Tensor:
    """[N, 3] -> [N, 3, C]: sines and cosines by turns, C the even number of channels that cover dim with three axes."""
    channels = 2 * math.ceil(dim / 6)
    angle = xyz[..., None] * ROPE_BASE ** (-torch.arange(0, channels, 2, device=xyz.device) / channels)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


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
            _laid(plan, None, (plan.slot, q)),
            _laid(plan, older[0], (plan.slot, k)),
            _laid(plan, older[1], (plan.slot, v)),
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


def _laid(plan: Plan, older: Tensor | None, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """[length, ...] in the slots of a plan: tokens [N, ...] at their slots, part after part, and those that are kept."""
    row = parts[0][1].new_zeros(plan.length, *parts[0][1].shape[1:])
    for slots, tokens in parts:
        row = row.index_copy(0, slots, tokens)
    if older is None or plan.kept is None or plan.kept_slot is None:
        return row
    return row.index_copy(0, plan.kept_slot, older[plan.kept])


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
