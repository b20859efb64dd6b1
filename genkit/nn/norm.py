"""Norms of tokens and of heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """norm(x) * (1 + scale) + shift over the last axis of x [..., D]: adaptive layer norm (Peebles and Xie, "DiT", 2023).

    shift and scale broadcast against x.
    """
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, [..., dim] (Zhang and Sennrich, 2019).

    Unlike torch.nn.RMSNorm it follows the dtype of x: under autocast the fused kernel needs a weight of the same dtype.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
