"""Non-causal state-space duality, one token after another: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def vssd(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """As `op.vssd` without skip and padding, arguments checked."""
    wide = torch.promote_types(v.dtype, torch.float32)
    B, N, H, V = v.shape
    G, K = q.shape[2:]
    q, k = (x.to(wide).repeat(1, 1, H // G, 1) for x in (q, k))  # [B, N, H, K]
    S = torch.zeros(B, H, K, V, dtype=wide, device=v.device)
    for t in range(N):
        S = S + k[:, t, :, :, None] * (weight[:, t, :, None] * v[:, t].to(wide))[:, :, None, :]
    return torch.stack([(q[:, t, :, :, None] * S).sum(2) for t in range(N)], 1).to(v)
