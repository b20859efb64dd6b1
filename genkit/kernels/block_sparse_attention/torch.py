"""Gathers the keys of every block of queries and multiplies in batches: for machines without a compiler, other dtypes and devices.

Blocks of queries with equally many blocks of keys go together, in portions, so that what is gathered stays small whatever the sequence; the backward pass
gathers again instead of keeping. On a GPU the sums over queries in dk and dv are made in no fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from genkit.kernels.block_sparse_attention.gradient import connect
from genkit.kernels.block_sparse_attention.pattern import Pattern

_PORTION = 2**22  # elements of gathered keys and values, and of scores


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.block_sparse_attention`."""
    return _forward(q, k, v, pattern.tensors, list(pattern.num_maps), pattern.block_size, scale, valid)


@dataclass(frozen=True)
class _Portion:
    """R blocks of queries with M blocks of keys each."""

    rows: Tensor  # [R], of [B H query blocks]
    ids: Tensor  # [R, M], of [B H key blocks]
    hidden: Tensor | None  # [R, size, M size] bool, what the queries do not see; None = nothing


def _portions(
    q: Tensor,
    k: Tensor,
    lists: list[Tensor],
    num_maps: list[int],
    size: int,
    width: int,
    valid: Tensor | None,
) -> Iterator[_Portion]:
    """All blocks of queries that see anything. `width` is that of a key and a value together."""
    B, H, N, _ = q.shape
    L, device = k.shape[2], q.device
    rows, columns = -(-N // size), -(-L // size)
    starts, _, ids, mask_ids = (t.long() for t in lists[:4])
    shows = torch.cat([lists[8], torch.ones(1, size, size, dtype=torch.bool, device=device)])  # mask -1 shows all
    exists = torch.ones(B, L, dtype=torch.bool, device=device) if valid is None else valid
    exists = pad(exists, (0, columns * size - L)).unflatten(1, (columns, size)).repeat_interleave(H, 0).flatten(0, 1)
    sample, head = torch.arange(B, device=device)[:, None], torch.arange(H, device=device)[None]
    maps = (sample if num_maps[0] > 1 else 0 * sample) * num_maps[1] + (head if num_maps[1] > 1 else 0 * head)
    list_of = (maps.flatten()[:, None] * rows + torch.arange(rows, device=device)).flatten()  # [B H query blocks]
    counts = starts.diff()[list_of]
    for M in counts.unique().tolist():
        if M == 0:
            continue
        some = (counts == M).nonzero()[:, 0]
        for row in some.split(max(1, _PORTION // (M * size * max(width, size)))):
            entry = starts[list_of[row], None] + torch.arange(M, device=device)  # [R, M]
            key = (row // rows)[:, None] * columns + ids[entry]
            hidden = None
            if bool((mask_ids[entry] >= 0).any()) or not bool(exists[key].all()):
                seen = shows[mask_ids[entry]] & exists[key][:, :, None]  # [R, M, size, size]
                hidden = ~seen.transpose(1, 2).flatten(2)
            yield _Portion(row, key, hidden)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[B, H, N, K] -> [B H blocks, size, K] in the dtype of sums, zeros at the end."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return pad(x.to(dtype), (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).flatten(0, 2)


def _whole(blocks: Tensor, like: Tensor, width: int) -> Tensor:
    """The way back of `_blocks`, [B, H, N, width] in the dtype of `like`."""
    return blocks.reshape(*like.shape[:2], -1, width)[:, :, : like.shape[2]].to(like.dtype).contiguous()


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    scores = (scale * q) @ k.transpose(1, 2)  # [R, size, M size]
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


@torch.library.custom_op("genkit::block_sparse_attention_torch", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: list[Tensor],
    num_maps: list[int],
    block_size: int,
    scale: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    K, V = q.shape[-1], v.shape[-1]
    q_blocks, k_blocks, v_blocks = (_blocks(x, block_size) for x in (q, k, v))
    o = q_blocks.new_zeros(*q_blocks.shape[:2], V)
    lse = q_blocks.new_full(q_blocks.shape[:2], -torch.inf)
    for part in _portions(q, k, lists, num_maps, block_size, K + V, valid):
        scores = _scores(q_blocks[part.rows], k_blocks[part.ids].flatten(1, 2), part.hidden, scale)
        norm = scores.logsumexp(-1)
        p = scores.sub_(norm.masked_fill(norm == -torch.inf, 0)[..., None]).exp_()
        o[part.rows] = p @ v_blocks[part.ids].flatten(1, 2)
        lse[part.rows] = norm
    return _whole(o, q, V), lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]].contiguous()


@torch.library.custom_op("genkit::block_sparse_attention_torch_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    lists: list[Tensor],
    num_maps: list[int],
    block_size: int,
    scale: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    K, V = q.shape[-1], v.shape[-1]
    q_blocks, k_blocks, v_blocks, do_blocks = (_blocks(x, block_size) for x in (q, k, v, do))
    delta = (do_blocks * _blocks(o, block_size)).sum(-1)  # [blocks, size]
    if dlse is not None:
        delta -= _blocks(dlse[..., None], block_size)[..., 0]
    # exp(score - inf) = 0: a query that sees nothing has no part in any gradient.
    norm = _blocks(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None], block_size)[..., 0]
    dq, dk, dv = (torch.zeros_like(x) for x in (q_blocks, k_blocks, v_blocks))
    for part in _portions(q, k, lists, num_maps, block_size, K + V, valid):
        q_rows, k_rows, do_rows = q_blocks[part.rows], k_blocks[part.ids].flatten(1, 2), do_blocks[part.rows]
        p = _scores(q_rows, k_rows, part.hidden, scale).sub_(norm[part.rows][..., None]).exp_()
        ds = do_rows @ v_blocks[part.ids].flatten(1, 2).transpose(1, 2)  # [R, size, M size]
        ds.sub_(delta[part.rows][..., None]).mul_(p).mul_(scale)
        dq[part.rows] = ds @ k_rows
        ids, shape = part.ids.flatten(), (-1, block_size)
        dk.index_add_(0, ids, (ds.transpose(1, 2) @ q_rows).reshape(*shape, K))
        dv.index_add_(0, ids, (p.transpose(1, 2) @ do_rows).reshape(*shape, V))
    return _whole(dq, q, K), _whole(dk, k, K), _whole(dv, v, V)


connect(_forward, _backward)
