"""Where octree tokens stand, and which of them share a window: laid out once for all blocks of a network.

A sample's tokens stand in a row, depth after depth and in z-order within; a window holds `window` of them, next to each other or `dilation` apart, in
some blocks moved by half a window. Tokens that can never see what comes later - those of finished depths - need not be computed again: their keys and
values are kept, and only windows with new tokens are looked at. A light pass computes a few tokens anew and takes the keys and values of all others from
the last full one (`Light`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genkit.octree.octree import Octree

ROPE_BASE = 100.0


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
        samples, depths: [length], of the slots; fillers belong to sample -1.
    """

    length: int
    shift: int
    slot: Tensor
    kept: Tensor | None
    kept_slot: Tensor | None
    samples: Tensor
    depths: Tensor

    def laid(self, older: Tensor | None, *parts: tuple[Tensor, Tensor]) -> Tensor:
        """[length, ...] in slots: tokens [N, ...] at theirs, part after part, and those that are kept."""
        row = parts[0][1].new_zeros(self.length, *parts[0][1].shape[1:])
        for slots, tokens in parts:
            row = row.index_copy(0, slots, tokens)
        if older is None or self.kept is None or self.kept_slot is None:
            return row
        return row.index_copy(0, self.kept_slot, older[self.kept])


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
    ids = torch.full((total,), -1, dtype=torch.int64, device=slots.device).index_copy_(0, slot, samples)
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
        return self.plan.laid(older, *passed, (self.own, own))

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


def waves(xyz: Tensor, dim: int) -> Tensor:
    """[N, 3] -> [N, 3, C]: sines and cosines by turns, C the even number of channels that cover dim with three axes."""
    channels = 2 * math.ceil(dim / 6)
    angle = xyz[..., None] * ROPE_BASE ** (-torch.arange(0, channels, 2, device=xyz.device) / channels)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
