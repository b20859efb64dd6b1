"""The causal convolution, one token after another: the specification that faster paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, has_silu: bool, reverse: bool
) -> Tensor:
    """As `op.causal_conv1d`, arguments checked and given in full."""
    dtype, N, K = x.dtype, x.shape[1], weight.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    taps = weight.to(wide).T  # [K, D]
    if reverse:
        taps, seen = taps.flip(0), torch.cat([x, initial_state], 1).to(wide)
    else:
        seen = torch.cat([initial_state, x], 1).to(wide)  # [B, N + K - 1, D]
    y = torch.stack([(taps * seen[:, t : t + K]).sum(1) for t in range(N)], 1)
    if bias is not None:
        y = y + bias.to(wide)
    return (silu(y) if has_silu else y).to(dtype)
