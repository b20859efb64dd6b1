"""State-space duality, one step after another: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `op.ssd` without dt and skip, arguments checked and given in full -> (o, last state)."""
    S = initial_state  # [B, H, K, V]
    heads = v.shape[2] // q.shape[2]
    q, k = (x.to(S).repeat_interleave(heads, 2) for x in (q, k))  # [B, N, H, K]
    values, decay = v.to(S), g.to(S).exp()
    steps = range(v.shape[1])
    out = []
    for t in reversed(steps) if reverse else steps:
        S = decay[:, t, :, None, None] * S + k[:, t, :, :, None] * values[:, t, :, None, :]
        out.append((scale * q[:, t, :, :, None] * S).sum(2))  # [B, H, V]
    return torch.stack(out[::-1] if reverse else out, dim=1).to(v), S.clone()
