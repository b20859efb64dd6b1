"""Non-causal state-space duality as two matrix products per group, the heads of a group side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def vssd(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """As `reference.vssd`."""
    wide = torch.promote_types(v.dtype, torch.float32)
    G = q.shape[2]
    query, key = (x.to(wide).transpose(1, 2) for x in (q, k))  # [B, G, N, K]
    # Head h = i G + g: [B, N, H, V] -> [B, G, N, (i V)]
    values = (v.to(wide) * weight[..., None]).unflatten(2, (-1, G)).permute(0, 3, 1, 2, 4).flatten(3)
    state = key.mT @ values  # [B, G, K, (i V)]
    o = (query @ state).unflatten(3, (-1, v.shape[3]))  # [B, G, N, i, V]
    return o.permute(0, 2, 3, 1, 4).flatten(2, 3).to(v)
