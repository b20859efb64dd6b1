"""Norms of tokens and of heads."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from genkit.errors import UsageError

Norm = Literal["none", "layer", "scaled_layer", "rms", "scaled_rms"]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, norm: nn.Module | None = None) -> Tensor:
    """norm(x) * (1 + scale) + shift over the last axis of x [..., D]: adaptive layer norm (Peebles and Xie, "DiT", 2023).

    shift and scale broadcast against x. Another `norm` than the layer norm without weights brings its own epsilon.
    """
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=eps) if norm is None else norm(x), 1 + scale)


def make_norm(kind: Norm, dim: int, eps: float = 1e-6) -> nn.Module:
    """The norm over the last axis [..., dim] that a word stands for; "scaled" ones have weights, none has biases.

    Raises: UsageError for another word.
    """
    if kind not in get_args(Norm):
        raise UsageError(f"a norm is one of {', '.join(get_args(Norm))}, found {kind!r}")
    if kind == "none":
        return nn.Identity()
    if kind in ("layer", "scaled_layer"):
        return nn.LayerNorm(dim, eps, elementwise_affine=kind == "scaled_layer", bias=False)
    return RMSNorm(dim, eps) if kind == "scaled_rms" else nn.RMSNorm(dim, eps, elementwise_affine=False)


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
