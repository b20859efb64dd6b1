"""A sparse attention pattern as lists of blocks, made once and used by every call.

For every block of queries the blocks of keys it sees, and the same transposed; blocks that are seen in part carry the number of a mask, and equal masks
are stored once. Queries x keys that no block covers do not exist for any path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.kernels.block_sparse_attention.rules import Rule, everything

BLOCK_SIZES = (16, 32, 64, 128)
_AT_ONCE = 2**22  # pairs whose rule is evaluated in one go, in 8 bytes each


@dataclass(frozen=True)
class Lists:
    """Who meets whom, row after row: row r of map g owns entries starts[g * rows + r] to starts[g * rows + r + 1]; those from partial_from[g * rows + r] on
    have a mask."""

    starts: Tensor  # [G * rows + 1] int32
    partial_from: Tensor  # [G * rows] int32
    ids: Tensor  # [entries] int32, the other side's block
    masks: Tensor  # [entries] int32, number of the mask; -1 = the whole block


@dataclass(frozen=True)
class Pattern:
    """Which blocks of queries meet which blocks of keys. Make it with `build`, `stack_heads` or `stack_samples`.

    `num_maps` is (samples, heads) of the maps, each 1 where all share one. The last block of either side may be short; what lies beyond the end is not
    marked in masks. `masks` [P, block_size, block_size] bool, True = seen, query first.
    """

    num_queries: int
    num_keys: int
    block_size: int
    num_maps: tuple[int, int]
    q_lists: Lists
    k_lists: Lists
    masks: Tensor
    density: float  # share of all pairs that are seen
    block_density: float  # share of all blocks that are visited: what it costs

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Of queries, of keys."""
        return math.ceil(self.num_queries / self.block_size), math.ceil(self.num_keys / self.block_size)

    @property
    def device(self) -> torch.device:
        return self.masks.device

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which the custom operations take them."""
        q, k = self.q_lists, self.k_lists
        return [q.starts, q.partial_from, q.ids, q.masks, k.starts, k.partial_from, k.ids, k.masks, self.masks]

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern with its tensors on a device."""
        moved = [t.to(device) for t in self.tensors]
        lists = Lists(*moved[:4]), Lists(*moved[4:8])
        sizes = self.num_queries, self.num_keys, self.block_size, self.num_maps
        return Pattern(*sizes, *lists, moved[8], self.density, self.block_density)

    def dense(self) -> Tensor:
        """[samples, heads, N, L] bool, samples and heads as in num_maps: for the reference and for looking at."""
        rows, columns = self.num_blocks
        size, G = self.block_size, math.prod(self.num_maps)
        g, i, j, m = _entries(self)
        blocks = torch.zeros(G, rows, columns, size, size, dtype=torch.bool, device=self.device)
        is_whole = m < 0
        blocks[g[is_whole], i[is_whole], j[is_whole]] = True
        blocks[g[~is_whole], i[~is_whole], j[~is_whole]] = self.masks[m[~is_whole]]
        dense = blocks.transpose(2, 3).reshape(*self.num_maps, rows * size, columns * size)
        return dense[..., : self.num_queries, : self.num_keys]


def build(rule: Rule | int, block_size: int = 64, *, blocks: Tensor | None = None) -> Pattern:
    """The pattern of a rule.

    Args:
        rule: who sees whom; a number = dense attention among that many tokens.
        block_size: 16, 32, 64 or 128 tokens. Smaller blocks follow a rule more closely, larger ones compute faster.
        blocks: [query blocks, key blocks], [H, ...] or [B, H, ...] bool: only these (H and B may be 1); what `top_blocks` and `random_blocks` give.

    Raises: ValueError for a block size or a shape that does not fit.
    """
    rule = everything(rule) if isinstance(rule, int) else rule
    N, L = rule.num_queries, rule.num_keys
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size {block_size} must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if N < 1 or L < 1:
        raise ValueError(f"a pattern needs tokens, got {N} queries and {L} keys")
    shape = math.ceil(N / block_size), math.ceil(L / block_size)
    if blocks is None:
        blocks = torch.ones(1, 1, *shape, dtype=torch.bool)
    elif blocks.dtype != torch.bool or not 2 <= blocks.ndim <= 4 or blocks.shape[-2:] != shape:
        raise ValueError(
            f"blocks must be bool [..., {shape[0]}, {shape[1]}] for {N} x {L} tokens in blocks of {block_size}, got {blocks.dtype} {list(blocks.shape)}"
        )
    device, blocks = blocks.device, blocks.cpu()
    blocks = blocks.reshape(*[1] * (4 - blocks.ndim), *blocks.shape)
    touched, covered = _bounds(rule, block_size)
    i, j = (touched & blocks.any(0).any(0)).nonzero(
        as_tuple=True
    )  # blocks of which one map at least may need something
    kind, masks, seen = _judge(rule, block_size, i, j, covered[i, j])
    used = blocks.flatten(0, 1)[:, i, j] & (kind > -2)  # [G, candidates]
    g, c = used.nonzero(as_tuple=True)
    pattern = _assemble(
        (N, L, block_size), (blocks.shape[0], blocks.shape[1]), (g, i[c], j[c], kind[c]), masks, seen[c]
    )
    return pattern.to(device)


def stack_heads(patterns: Sequence[Pattern]) -> Pattern:
    """One pattern per head."""
    return _stack(patterns, 1)


def stack_samples(patterns: Sequence[Pattern]) -> Pattern:
    """One pattern per sample of the batch."""
    return _stack(patterns, 0)


def top_blocks(q: Tensor, k: Tensor, count: int, block_size: int = 64) -> Tensor:
    """Per block of queries the `count` blocks of keys with the largest product of means, and its own block: [B, H, query blocks, key blocks] bool.

    The choice of Video Sparse Attention and MInference: softmax keeps the order of scores, so none is needed.

    Args:
        q, k: [B, H, N, K] and [B, H, L, K].
    """
    with torch.no_grad():
        scores = _means(q, block_size) @ _means(k, block_size).transpose(-1, -2)  # [B, H, query blocks, key blocks]
        chosen = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True) | _own(scores)


def random_blocks(
    num_queries: int, num_keys: int, block_size: int, density: float, *, num_heads: int = 1, seed: int = 0
) -> Tensor:
    """[num_heads, query blocks, key blocks] bool: every row's own block and others at random, `density` of all as nearly as whole blocks allow."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = math.ceil(num_queries / block_size), math.ceil(num_keys / block_size)
    draw = torch.rand(num_heads, rows, columns, generator=random) + _own(torch.empty(1, rows, columns))
    return draw.argsort(-1, descending=True).argsort(-1) < max(1, round(density * columns))


def _own(like: Tensor) -> Tensor:
    """True where the block of queries holds the same tokens as the block of keys."""
    rows, columns = like.shape[-2:]
    return torch.eye(rows, columns, dtype=torch.bool, device=like.device).expand(like.shape)


def _means(x: Tensor, size: int) -> Tensor:
    """[B, H, N, K] -> [B, H, blocks, K], the last block over what there is."""
    N = x.shape[2]
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -N % size)).unflatten(2, (-1, size)).sum(3)
    counts = torch.full((padded.shape[2], 1), float(size), device=x.device)
    counts[-1] -= -N % size
    return padded / counts


def _bounds(rule: Rule, size: int) -> tuple[Tensor, Tensor]:
    """[query blocks, key blocks] bool twice: a block may hold a visible pair; all of its pairs are visible by one box."""
    rows, columns = math.ceil(rule.num_queries / size), math.ceil(rule.num_keys / size)
    touched = torch.zeros(rows, columns, dtype=torch.bool)
    covered = torch.zeros_like(touched)
    for box in rule.boxes:
        may, must = torch.ones_like(touched), torch.ones_like(touched)
        for at, low, high in zip(box.at, box.low, box.high, strict=True):
            first, last = _extremes(at, size)
            (least_low, most_low), (least_high, most_high) = _extremes(low, size), _extremes(high, size)
            may &= (least_low[:, None] <= last[None]) & (first[None] <= most_high[:, None])
            must &= (most_low[:, None] <= first[None]) & (last[None] <= least_high[:, None])
        touched |= may
        covered |= must
    return touched, covered


def _extremes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[N] -> least and greatest per block, the short last one over what there is."""
    padded = torch.cat([x, x[-1:].expand(-len(x) % size)]).unflatten(0, (-1, size))
    return padded.amin(1), padded.amax(1)


def _judge(rule: Rule, size: int, i: Tensor, j: Tensor, covered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each block is: (-2 = empty, -1 = whole or the number of its mask; masks [P, size, size]; visible pairs)."""
    rows = (rule.num_queries - i * size).clamp(max=size)
    columns = (rule.num_keys - j * size).clamp(max=size)
    kind = torch.where(covered, -1, -2)
    seen = torch.where(covered, rows * columns, 0)
    found: list[tuple[Tensor, Tensor]] = []  # (which blocks, their masks)
    inside = torch.arange(size)
    for some in (~covered).nonzero()[:, 0].split(max(1, _AT_ONCE // size**2)):
        at_i, at_j = i[some, None] * size + inside, j[some, None] * size + inside  # [n, size]
        mask = rule.visible(
            at_i.clamp(max=rule.num_queries - 1)[:, :, None], at_j.clamp(max=rule.num_keys - 1)[:, None]
        )
        mask &= (at_i < rule.num_queries)[:, :, None] & (at_j < rule.num_keys)[:, None]
        seen[some] = mask.sum((1, 2))
        kind[some[seen[some] == (rows * columns)[some]]] = -1
        is_partial = (kind[some] == -2) & (seen[some] > 0)
        found.append((some[is_partial], mask[is_partial]))
    if not found or not sum(len(some) for some, _ in found):
        return kind, torch.zeros(0, size, size, dtype=torch.bool), seen
    masks, number = _distinct(torch.cat([mask for _, mask in found]))
    kind[torch.cat([some for some, _ in found])] = number
    return kind, masks, seen


def _distinct(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Equal masks once: ([P, size, size], the number of each)."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (masks[0].numel(),), generator=random)
    keys = torch.cat([(part.flatten(1) * weights).sum(1) for part in masks.split(1024)])  # equal masks have equal keys
    _, number = keys.unique(return_inverse=True)
    first = torch.full((int(number.max()) + 1,), len(masks)).scatter_reduce_(
        0, number, torch.arange(len(masks)), "amin"
    )
    if not all(
        torch.equal(part, masks[first[n]]) for part, n in zip(masks.split(1024), number.split(1024), strict=True)
    ):
        return masks, torch.arange(len(masks))  # two different masks with one key: keep all
    return masks[first], number


def _assemble(
    sizes: tuple[int, int, int],
    num_maps: tuple[int, int],
    entries: tuple[Tensor, Tensor, Tensor, Tensor],
    masks: Tensor,
    seen: Tensor,
) -> Pattern:
    """The lists of entries (map, query block, key block, mask), each met once; `seen` counts their visible pairs."""
    N, L, size = sizes
    G, rows, columns = math.prod(num_maps), math.ceil(N / size), math.ceil(L / size)
    if len(seen) >= 2**31 // size:
        raise ValueError(f"{len(seen)} blocks are more than the kernels count; use larger blocks or fewer maps")
    g, i, j, m = entries
    lists = _lists(g * rows + i, j, m, G * rows), _lists(g * columns + j, i, m, G * columns)
    density = int(seen.sum()) / (G * N * L)
    return Pattern(N, L, size, num_maps, *lists, masks, density, len(seen) / (G * rows * columns))


def _lists(row: Tensor, other: Tensor, mask: Tensor, count: int) -> Lists:
    """Sorted by row, whole blocks before partial ones, then by the other side's block."""
    order = other.argsort(stable=True)
    order = order[(mask >= 0)[order].to(torch.uint8).argsort(stable=True)]
    order = order[row[order].argsort(stable=True)]
    per_row = torch.bincount(row, minlength=count)
    starts = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    partial_from = starts[:-1] + torch.bincount(row[mask < 0], minlength=count)
    return Lists(*(t.to(torch.int32) for t in (starts, partial_from, other[order], mask[order])))


def _entries(pattern: Pattern) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(map, query block, key block, mask) of every entry, int64."""
    lists = pattern.q_lists
    rows = pattern.num_blocks[0]
    counts = lists.starts.long().diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return row // rows, row % rows, lists.ids.long(), lists.masks.long()


def _stack(patterns: Sequence[Pattern], dim: int) -> Pattern:
    if not patterns:
        raise ValueError("there is no pattern to stack")
    shapes = {(p.num_queries, p.num_keys, p.block_size, p.num_maps[1 - dim]) for p in patterns}
    if len(shapes) > 1:
        raise ValueError(
            f"patterns to stack must agree in queries, keys, block size and number of maps, got {sorted(shapes)}"
        )
    maps = [p.num_maps[dim] for p in patterns]
    num_maps = (sum(maps), patterns[0].num_maps[1]) if dim == 0 else (patterns[0].num_maps[0], sum(maps))
    parts, masks, base, first = [], [], 0, 0
    for p, count in zip(patterns, maps, strict=True):
        g, i, j, m = _entries(p)
        sample, head = g // p.num_maps[1], g % p.num_maps[1]
        sample, head = (sample + first, head) if dim == 0 else (sample, head + first)
        parts.append((sample * num_maps[1] + head, i, j, torch.where(m >= 0, m + base, m)))
        masks.append(p.masks)
        base, first = base + len(p.masks), first + count
    g, i, j, m = (torch.cat(column) for column in zip(*parts, strict=True))
    every = torch.cat(masks)
    if len(every):
        every, number = _distinct(every)
        m = torch.where(m >= 0, number[m.clamp(min=0)], m)
    N, L, size = patterns[0].num_queries, patterns[0].num_keys, patterns[0].block_size
    whole = (N - i * size).clamp(max=size) * (L - j * size).clamp(max=size)
    seen = torch.where(m >= 0, every.flatten(1).sum(1)[m.clamp(min=0)] if len(every) else whole, whole)
    return _assemble((N, L, size), num_maps, (g, i, j, m), every, seen)
