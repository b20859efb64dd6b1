"""Prefix softmax one token after another, as the paper's recurrent cell: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def aaren(scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """As `op.aaren`, arguments checked and given in full; returns o and the last L [B, H].

    The cell keeps the largest score m, u = sum exp(s - m) and w = sum exp(s - m) v; o = w / u.
    """
    if v.dtype in (torch.bfloat16, torch.float16):
        o, log_denominator = aaren(scores.float(), v.float(), log_denominator, mean.float(), reverse)
        return o.to(v.dtype), log_denominator
    m = log_denominator.detach()
    u = (log_denominator - _finite(m)).exp()  # [B, H]
    w = u[..., None] * mean  # [B, H, V]
    steps = range(v.shape[1])
    out = []
    for t in reversed(steps) if reverse else steps:
        largest = torch.maximum(m, scores[:, t]).detach()
        before, now = (m - _finite(largest)).exp(), (scores[:, t] - _finite(largest)).exp()
        m, u, w = largest, u * before + now, w * before[..., None] + now[..., None] * v[:, t]
        out.append(w / torch.where(u == 0, 1, u)[..., None])
    last = torch.where(u == 0, -torch.inf, _finite(m) + torch.where(u == 0, 1, u).log())
    return torch.stack(out[::-1] if reverse else out, dim=1), last


def _finite(m: Tensor) -> Tensor:
    """A largest score of -inf means no token yet; any number serves to subtract, since exp(-inf - 0) = 0."""
    return m.masked_fill(m == -torch.inf, 0)
