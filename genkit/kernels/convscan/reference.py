"""ConvS5 one frame after another in complex numbers: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def convscan(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `op.convscan`, arguments checked and given in full; returns y and the last state."""
    x, out = state, []
    for t in range(u.shape[2]):
        x = decay[:, None, None] * x + conv2d(u[:, :, t].to(B.dtype), B, padding="same")  # [B, P, Y, X]
        out.append(2 * conv2d(x, C, padding="same").real)
    return torch.stack(out, 2), x
