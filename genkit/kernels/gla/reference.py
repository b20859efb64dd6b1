"""Gated linear attention, one step after another: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `op.gla`, arguments checked and given in full -> (o, last state)."""
    S = initial_state  # [B, H, K, V]
    q, k, values, decay = q.to(S) * scale, k.to(S), v.to(S), g.to(S).exp()
    steps = range(v.shape[1])
    out = []
    for t in reversed(steps) if reverse else steps:
        S = decay[:, t, :, :, None] * S + k[:, t, :, :, None] * values[:, t, :, None, :]
        out.append((q[:, t, :, :, None] * S).sum(2))  # [B, H, V]
    return torch.stack(out[::-1] if reverse else out, dim=1).to(v), S.clone()
