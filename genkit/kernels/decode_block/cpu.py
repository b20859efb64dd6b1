"""The compiled path of decode_block; see cpu.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genkit import native

MOST = 32  # samples; for more, large matrix products are faster


def refuses(x: Tensor, *rest: Any) -> str | None:
    """Why these arguments need another path."""
    tensors = [x, *(y for y in rest if isinstance(y, Tensor))]
    if any(y.dtype != torch.float32 for y in tensors if y.is_floating_point()):
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
    first: Tensor | None = None,
) -> Tensor:
    """As `reference.decode_block`."""
    return bound(norm1, wqkv, wo, norm2, wup, wdown, keys, values, eps, first)(x, cos, sin, length)


def bound(
    norm1: Tensor,
    wqkv: Tensor,
    wo: Tensor,
    norm2: Tensor,
    wup: Tensor,
    wdown: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
    first: Tensor | None = None,
) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """(x, cos, sin, length) -> what decode_block gives, with what stays from token to token looked at once."""
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous, since they are written in place")
    B, G, room, K = keys.shape
    D, F = wdown.shape
    sizes = (B, D, wqkv.shape[0] // K - 2 * G, G, K, F)
    held = [y.contiguous() for y in (norm1, wqkv, wo, norm2, wup, wdown)]
    first = None if first is None else first.contiguous()
    weights, pair = [y.data_ptr() for y in held], (keys.data_ptr(), values.data_ptr(), _pointer(first))
    call = native.function("decode_block", "decode_block", "p" * 13 + "i" * 8 + "f")

    def run(x: Tensor, cos: Tensor, sin: Tensor, length: int, held: Any = (held, keys, values, first)) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        call(x.data_ptr(), out.data_ptr(), *weights, cos.data_ptr(), sin.data_ptr(), *pair, *sizes, length, room, eps)
        return out

    return run


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
