"""Gated linear attention in chunks, plain torch: what is within a chunk by matrix products over halves, what is before it through the state."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 64
_LEAF = 4  # pairs closer than this are summed one by one
# exp of it is below what rounds; sums of much less would round themselves, and -inf - -inf is no number.
_CLOSED = -60.0


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.gla`.

    The weight of token j at token i is sum_c q_ic k_jc exp(G_ic - G_jc), G the sum of gates so far, and factors into a product of matrices only about
    a point r between the two: exp(G_i - G_r) exp(G_r - G_j), both at most 1. A chunk is halved again and again; all pairs that a halving separates
    share its middle as r. No exponent is ever positive, so no gate is too strong.
    """
    N = v.shape[1]
    padding = -N % _CHUNK
    S = initial_state

    def chunks(x: Tensor) -> Tensor:
        """[B, N, H, c] -> [B, H, n, chunk, c] in the order of time, zeros behind the end: no decay, nothing written."""
        x = x.to(S).flip(1) if reverse else x.to(S)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        return x.unflatten(1, (-1, _CHUNK)).permute(0, 3, 1, 2, 4).contiguous()

    query, key, value = chunks(q) * scale, chunks(k), chunks(v)
    G = chunks(g).clamp_min(_CLOSED).cumsum(3)
    last = G[..., -1, :]  # [B, H, n, K]

    weights = _within(query, key, G)  # [B, H, n, chunk, chunk]
    written = (key * (last[..., None, :] - G).exp()).mT @ value  # [B, H, n, K, V]
    decay = last.exp()[..., None]
    before = []
    for n in range(G.shape[2]):
        before.append(S)
        S = decay[:, :, n] * S + written[:, :, n]
    o = weights @ value + (query * G.exp()) @ torch.stack(before, 2)
    o = o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :N].to(v)
    return o.flip(1) if reverse else o, S


def _within(query: Tensor, key: Tensor, G: Tensor) -> Tensor:
    """Weights [..., n, n] of each token (rows) for itself and those before it in the chunk, zero elsewhere."""
    n = query.shape[-2]
    if n <= _LEAF:
        difference = G[..., :, None, :] - G[..., None, :, :]
        later = torch.ones(n, n, dtype=torch.bool, device=G.device).triu(1)[..., None]
        pairs = query[..., :, None, :] * key[..., None, :, :] * difference.masked_fill(later, -torch.inf).exp()
        return pairs.sum(-1)
    # Halves become one more batch axis, so that a level is one call however many pieces there are.
    query, key, G = (x.unflatten(-2, (2, n // 2)) for x in (query, key, G))
    middle = G[..., 0, -1:, :]
    across = (query[..., 1, :, :] * (G[..., 1, :, :] - middle).exp()) @ (
        key[..., 0, :, :] * (middle - G[..., 0, :, :]).exp()
    ).mT
    inside = _within(query, key, G)  # [..., 2, n / 2, n / 2]
    nothing = torch.zeros_like(across)
    upper = torch.cat([inside[..., 0, :, :], nothing], -1)
    return torch.cat([upper, torch.cat([across, inside[..., 1, :, :]], -1)], -2)
