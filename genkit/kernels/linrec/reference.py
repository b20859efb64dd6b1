"""The elementwise linear recurrence, one step after another: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def linrec(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """As `op.linrec`, arguments checked and given in full: a is [B, N, D], [B, 1, D] or [1, 1, D]."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return linrec(a.float(), b.float(), h0.float(), reverse).to(b.dtype)
    a = a.expand_as(b)
    steps = range(b.shape[1])
    h, out = h0, []
    for t in reversed(steps) if reverse else steps:
        h = a[:, t] * h + b[:, t]  # [B, D]
        out.append(h)
    return torch.stack(out[::-1] if reverse else out, dim=1)
