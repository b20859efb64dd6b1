"""LightNet's recurrence one token after another: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = -1e30  # stands for -inf, whose differences would be NaN


def lightnet(
    q: Tensor,
    g: Tensor,
    v: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    z: Tensor,
    S: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `op.lightnet`, arguments checked and given in full; returns o and the last state."""
    dtype = v.dtype
    k = torch.ones_like(g) if k is None else k
    q, g, v, k = (x.to(S.dtype) for x in (q, g, v, k))
    if mask is not None:
        g, k = g.masked_fill(~mask[:, :, None, None], _NEVER), k.masked_fill(~mask[:, :, None, None], 0)
    z = z.clamp_min(_NEVER)
    out = []
    for t in range(v.shape[1]):
        before, z = z, torch.logaddexp(z, g[:, t])  # [B, H, K]
        new = ((g[:, t] - z).exp() * k[:, t])[..., None] * v[:, t, :, None]  # [B, H, K, V]
        S = (before - z).exp()[..., None] * S + new
        out.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    if not is_causal:  # every token reads the last sum
        out = [scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S) for t in range(v.shape[1])]
    return torch.stack(out, 1).to(dtype), z.masked_fill(z < _NEVER / 2, -torch.inf), S
