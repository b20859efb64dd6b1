"""The causal convolution in plain torch: one shifted product per tap, channels staying last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool
) -> Tensor:
    """As `reference.causal_conv1d`."""
    dtype, N, K = x.dtype, x.shape[1], weight.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    weight = weight.to(wide)
    seen = torch.cat([x, initial_state] if reverse else [initial_state, x], 1).to(wide)  # [B, N + K - 1, D]
    y = seen[:, :N] * weight[:, K - 1 if reverse else 0]
    for k in range(1, K):
        y = torch.addcmul(y, seen[:, k : k + N], weight[:, K - 1 - k if reverse else k])
    if bias is not None:
        y = y + bias.to(wide)
    return (silu(y) if has_silu else y).to(dtype)
