"""Attention under a mask, in full: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.kernels.block_sparse_attention.pattern import Pattern


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `op.block_sparse_attention`, arguments checked and given in full."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    is_seen = pattern.dense()  # [B or 1, H or 1, N, L]
    if valid is not None:
        is_seen = is_seen & valid[:, None, None]
    scores = scale * q.to(dtype) @ k.to(dtype).transpose(-1, -2)  # [B, H, N, L]
    scores = scores.masked_fill(~is_seen, -torch.inf)
    lse = scores.logsumexp(-1)  # [B, H, N]
    # A row that sees nothing has lse -inf; exp(-inf - 0) makes its probabilities 0 instead of NaN.
    p = (scores - lse.masked_fill(~is_seen.any(-1), 0.0)[..., None]).exp()
    return (p @ v.to(dtype)).to(q.dtype), lse
