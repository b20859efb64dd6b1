"""The selective scan, one token after another: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """As `op.selective_scan`, arguments checked and given in full, B and C [B, N, G, R]; returns y and the last state."""
    dtype = u.dtype
    wide = torch.promote_types(dtype, torch.float32)
    u, delta = u.to(wide), delta.to(wide)
    A, B, C, h = (x.to(torch.promote_types(wide, A.dtype)) for x in (A, B, C, initial_state))
    per_group = u.shape[2] // B.shape[2]
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide)
    if delta_softplus:
        delta = softplus(delta, threshold=20)  # above 20 it is the identity, as published
    steps = range(u.shape[1])
    out = []
    for t in reversed(steps) if reverse else steps:
        d = delta[:, t, :, None]  # [B, D, 1]
        B_t, C_t = B[:, t].repeat_interleave(per_group, 1), C[:, t].repeat_interleave(per_group, 1)  # [B, D, R]
        h = torch.exp(d * A) * h + d * u[:, t, :, None] * B_t
        out.append((C_t * h).sum(2))
    y = torch.stack(out[::-1] if reverse else out, dim=1)  # [B, N, D]
    if y.is_complex():
        y = 2 * y.real  # of each state and its conjugate
    if D_skip is not None:
        y = y + D_skip.to(wide) * u
    if z is not None:
        y = y * silu(z.to(wide))
    return y.to(dtype), h
