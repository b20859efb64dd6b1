"""Which query sees which key, as plain index arithmetic: a union of boxes, so that whole blocks can be judged by their bounds.

Every rule here is about positions in one sequence. Rules combine: `band(N, 64) & segments([100, 156])`, `line(grid, 0) | line(grid, 1)`,
`frame_band((13, 30, 45), 21).with_prefix(226)`, and `permuted` follows a reordering of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Query i sees key j iff low[a, i] <= at[a, j] <= high[a, i] on every axis a; without axes it sees all."""

    at: Tensor  # [A, L] int64, coordinates of the keys
    low: Tensor  # [A, N] int64, as seen from the queries
    high: Tensor  # [A, N]


@dataclass(frozen=True)
class Rule:
    """Query i sees key j iff one of the boxes says so."""

    boxes: tuple[Box, ...]
    num_queries: int
    num_keys: int

    def __or__(self, other: Rule) -> Rule:
        """Seen by either."""
        self._check(other)
        return Rule(self.boxes + other.boxes, self.num_queries, self.num_keys)

    def __and__(self, other: Rule) -> Rule:
        """Seen by both."""
        self._check(other)
        boxes = tuple(
            Box(torch.cat([a.at, b.at]), torch.cat([a.low, b.low]), torch.cat([a.high, b.high]))
            for a in self.boxes
            for b in other.boxes
        )
        return Rule(boxes, self.num_queries, self.num_keys)

    def with_prefix(self, count: int) -> Rule:
        """`count` tokens more, in front, that see all and are seen by all: text before video, class tokens, registers."""
        N, L = self.num_queries + count, self.num_keys + count
        boxes = []
        for box in self.boxes:
            # Nothing lies between 1 and 0: on an axis of its own the prefix neither sees by this box nor is seen by it.
            at = torch.cat([_steps(count, 0), _steps(self.num_keys, 1)], 1)
            low = torch.cat([_steps(count, 1), _steps(self.num_queries, 1)], 1)
            high = torch.cat([_steps(count, 0), _steps(self.num_queries, 1)], 1)
            rest = [torch.nn.functional.pad(x, (count, 0)) for x in (box.at, box.low, box.high)]
            boxes.append(Box(torch.cat([rest[0], at]), torch.cat([rest[1], low]), torch.cat([rest[2], high])))
        return Rule(tuple(boxes), N, L) | _prefix(N, L, count)

    def permuted(self, order: Tensor) -> Rule:
        """The rule for tokens taken in another order: new token n is old token order[n] ([N] int64), as query and as key."""
        if self.num_queries != self.num_keys or order.shape != (self.num_keys,):
            raise ValueError(
                f"an order of {list(order.shape)} does not go with {self.num_queries} queries and {self.num_keys} keys; one index per token is needed"
            )
        boxes = tuple(Box(box.at[:, order], box.low[:, order], box.high[:, order]) for box in self.boxes)
        return Rule(boxes, self.num_queries, self.num_keys)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether queries i see keys j (int64, broadcastable): bool."""
        seen = torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool)
        for box in self.boxes:
            inside = torch.ones_like(seen)
            for at, low, high in zip(box.at, box.low, box.high, strict=True):
                there = at[j]
                inside &= (low[i] <= there) & (there <= high[i])
            seen |= inside
        return seen

    def dense(self) -> Tensor:
        """[N, L] bool."""
        return self.visible(torch.arange(self.num_queries)[:, None], torch.arange(self.num_keys)[None])

    def _check(self, other: Rule) -> None:
        mine, its = (self.num_queries, self.num_keys), (other.num_queries, other.num_keys)
        if mine != its:
            raise ValueError(
                f"rules for {mine[0]} x {mine[1]} and {its[0]} x {its[1]} queries x keys do not combine; make both for the same tokens"
            )


def everything(num_queries: int, num_keys: int | None = None) -> Rule:
    """Dense attention."""
    N, L = num_queries, num_queries if num_keys is None else num_keys
    return Rule((Box(*(torch.empty(0, n, dtype=torch.int64) for n in (L, N, N))),), N, L)


def band(num_tokens: int, reach: int, *, is_clamped: bool = False) -> Rule:
    """|i - j| <= reach.

    Args:
        is_clamped: the window keeps its 2 reach + 1 keys at both ends of the sequence, moved inside instead of cut.
    """
    position = _steps(num_tokens)
    low, high = _window(position, reach, num_tokens) if is_clamped else (position - reach, position + reach)
    return _rule(position, low, high)


def causal(num_queries: int, num_keys: int | None = None) -> Rule:
    """j <= i. With more keys than queries the queries are the last tokens, as with a cache of earlier keys."""
    L = num_queries if num_keys is None else num_keys
    last = _steps(num_queries) + (L - num_queries)
    return _rule(_steps(L), torch.zeros_like(last), last)


def chunk_causal(lengths: Sequence[int]) -> Rule:
    """Chunks of these lengths one after another; a token sees its own chunk and all before: autoregressive video by frames, scales of VAR."""
    chunk = torch.repeat_interleave(torch.tensor(lengths))[None]
    return _rule(chunk, torch.zeros_like(chunk), chunk)


def segments(lengths: Sequence[int]) -> Rule:
    """Several sequences of these lengths packed into one; tokens see only their own. Lengths from boundaries: `cu_seqlens.diff().tolist()`."""
    segment = torch.repeat_interleave(torch.tensor(lengths))[None]
    return _rule(segment, segment, segment)


def window(grid: Sequence[int], size: Sequence[int], tile: Sequence[int] | None = None) -> Rule:
    """A window of `size` tiles around the query's own tile, per axis of a row-major grid of 1, 2 or 3 axes; never cut at borders but moved inside.

    Sliding Tile Attention (Zhang et al. 2025): all tokens of a tile see the same tiles. With tiles of one token it is a sliding window. Tiles at the far
    end of an axis that it does not divide are smaller. To make blocks dense, reorder the tokens with `tile_order`, and let a tile hold a multiple of
    a block: `window(grid, size, tile).permuted(tile_order(grid, tile))`.

    Args:
        size: odd numbers of tiles; as many as there are, or more, means all.
    """
    tile = [1] * len(grid) if tile is None else tile
    if not len(grid) == len(size) == len(tile):
        raise ValueError(f"grid {list(grid)}, size {list(size)} and tile {list(tile)} need one number per axis each")
    if even := [s for s in size if s % 2 == 0 or s < 1]:
        raise ValueError(f"a window of {even[0]} tiles has no middle; sizes must be odd, got {list(size)}")
    place = torch.stack([c // t for c, t in zip(_coordinates(grid), tile, strict=True)])  # [A, N]
    counts = [math.ceil(n / t) for n, t in zip(grid, tile, strict=True)]
    ends = [_window(p, s // 2, n) for p, s, n in zip(place, size, counts, strict=True)]
    return _rule(place, torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends]))


def line(grid: Sequence[int], axis: int) -> Rule:
    """Tokens that differ only along one axis: rows (axis -1) or columns (axis -2) of an image. `|` of all axes is axial attention (Ho et al. 2019).

    In row-major order only the last axis is sparse in blocks; lines along others touch a key of nearly every block.
    """
    place = _coordinates(grid)
    rest = torch.stack([c for a, c in enumerate(place) if a != axis % len(grid)])
    return _rule(rest, rest, rest)


def frame_band(grid: Sequence[int], reach: int) -> Rule:
    """Video [F, Y, X]: in every frame, the keys whose raster position within the frame is at most `reach` from the query's (Re-ttention, Chen et al. 2025)."""
    place = (torch.arange(math.prod(grid)) % math.prod(grid[1:]))[None]
    return _rule(place, place - reach, place + reach)


def tile_order(grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """[N] int64: row-major indices in the order in which every tile is contiguous. x[:, order] reorders tokens; `order.argsort()` is the way back."""
    key = torch.zeros(math.prod(grid), dtype=torch.int64)
    place = _coordinates(grid)
    for c, n, t in zip(place, grid, tile, strict=True):
        key = key * math.ceil(n / t) + c // t
    for c, t in zip(place, tile, strict=True):
        key = key * t + c % t
    return key.argsort()


def _prefix(num_queries: int, num_keys: int, count: int) -> Rule:
    """The first `count` keys are seen by all, the first `count` queries see all."""
    at, row = _steps(num_keys), _steps(num_queries)
    seen = Box(at, torch.zeros_like(row), torch.full_like(row, count - 1))
    seeing = Box(at, torch.zeros_like(row), torch.where(row < count, num_keys, -1))
    return Rule((seen, seeing), num_queries, num_keys)


def _rule(at: Tensor, low: Tensor, high: Tensor) -> Rule:
    return Rule((Box(at, low, high),), low.shape[1], at.shape[1])


def _window(place: Tensor, reach: int, count: int) -> tuple[Tensor, Tensor]:
    """First and last of the 2 reach + 1 places around each, moved inside 0..count-1."""
    low = (place - reach).clamp(max=count - 1 - 2 * reach).clamp(min=0)
    high = (place + reach).clamp(min=2 * reach).clamp(max=count - 1)
    return low, high


def _coordinates(grid: Sequence[int]) -> list[Tensor]:
    """Per axis, of every token of a row-major grid: [N] int64."""
    return [c.flatten() for c in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")]


def _steps(count: int, value: int | None = None) -> Tensor:
    """[1, count]: 0, 1, 2, ..., or one value."""
    return torch.arange(count)[None] if value is None else torch.full((1, count), value)
