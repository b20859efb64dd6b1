"""The compiled path of decode_block; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import native

MOST = 32  # samples; for more, large matrix products are faster


def refuses(x: Tensor, *rest: Any) -> str | None:
    """Why these arguments need another path."""
    tensors = [x, *(y for y in rest if isinstance(y, Tensor))]
    if any(y.dtype != torch.float32 for y in tensors):
        return "it computes in float32"
    if x.shape[0] > MOST:
        return f"it is for up to {MOST} samples, these are {x.shape[0]}"
    return None


def decode_block(
    x: Tensor,
    norm1: Tensor,
    wqkv: Tensor,
    wo: Tensor,
    norm2: Tensor,
    wup: Tensor,
    wdown: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    eps: float,
) -> Tensor:
    """As `reference.decode_block`."""
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous, since they are written in place")
    B, G, room, K = keys.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    read = [y.contiguous() for y in (norm1, wqkv, wo, norm2, wup, wdown, cos, sin)]
    H = wqkv.shape[0] // K - 2 * G
    native.function("decode_block", "decode_block", "p" * 12 + "i" * 8 + "f")(
        x.contiguous(), out, *read, keys, values, B, x.shape[1], H, G, K, wdown.shape[1], length, room, eps
    )
    return out
