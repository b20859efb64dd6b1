"""State-space duality in chunks, plain torch: masked attention within a chunk, the state between them (Dao and Gu 2024, listing 1)."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 64
# exp of it is below what rounds; sums of much less would round themselves, and -inf - -inf is no number.
_CLOSED = -60.0


def ssd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`."""
    B, N, H, V = v.shape
    groups = q.shape[2]
    padding = -N % _CHUNK

    def chunks(x: Tensor) -> Tensor:
        """[B, N, h, c] -> [B, G, h / G, n, chunk, c] in the order of time, zeros behind the end: no decay, nothing written."""
        x = x.to(initial_state).flip(1) if reverse else x.to(initial_state)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        return x.unflatten(2, (groups, -1)).unflatten(1, (-1, _CHUNK)).permute(0, 3, 4, 1, 2, 5).contiguous()

    query, key, value = chunks(q) * scale, chunks(k), chunks(v)
    G = chunks(g[..., None]).clamp_min(_CLOSED).cumsum(4)[..., 0]  # [B, G, h, n, chunk]
    last = G[..., -1:]
    later = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=G.device).triu(1)
    # Masked before the exponential: what lies ahead would grow without bound.
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf).exp()
    weights = (query @ key.mT) * decay  # [B, G, h, n, chunk, chunk]; the product is shared by the heads of a group
    written = key.mT @ (value * (last - G).exp()[..., None])  # [B, G, h, n, K, V]
    through = last.exp()[..., None]
    S = initial_state.unflatten(1, (groups, -1))  # [B, G, h, K, V]
    before = []
    for n in range(G.shape[3]):
        before.append(S)
        S = through[:, :, :, n] * S + written[:, :, :, n]
    o = weights @ value + (query @ torch.stack(before, 3)) * G.exp()[..., None]
    o = o.permute(0, 3, 4, 1, 2, 5).reshape(B, -1, H, V)[:, :N].to(v)
    return o.flip(1) if reverse else o, S.flatten(1, 2)
