"""Elementwise linear recurrence h_t = a_t h_{t-1} + b_t, the base of S5, ConvS5, exponential averages and other diagonal state spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_linrec = Operation("linrec")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def linrec(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False, path: str | None = None) -> Tensor:
    """h [B, N, D] with h_t = a_t h_{t-1} + b_t.

    Args:
        a: the decay, [B, N, D]; or the same for all tokens, [B, 1, D] or [D], which is never expanded in memory. Differentiable, as b and h0.
        b: [B, N, D], the input, real or complex; same dtype and device as a. bfloat16 and float16 are computed in float32.
        h0: [B, D], the state before the first step; None = 0.
        reverse: the recurrence runs from the last token to the first, and h0 stands behind the last.
        path: see genkit.dispatch.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if b.ndim != 3 or 0 in b.shape:
        raise ValueError(f"linrec: b must be [B, N, D] with no size 0, got {list(b.shape)}")
    if b.dtype not in _DTYPES:
        raise ValueError(f"linrec: b is {b.dtype}; it must be a floating-point or complex type")
    B, N, D = b.shape
    h0 = b.new_zeros(B, D) if h0 is None else h0
    if a.shape not in ((B, N, D), (B, 1, D), (D,)):
        raise ValueError(
            f"linrec: a must be {[B, N, D]}, {[B, 1, D]} or {[D]} to go with b {[B, N, D]}, got {list(a.shape)}"
        )
    if h0.shape != (B, D):
        raise ValueError(f"linrec: h0 must be {[B, D]} to go with b {[B, N, D]}, got {list(h0.shape)}")
    for name, given in (("a", a), ("h0", h0)):
        if given.dtype != b.dtype or given.device != b.device:
            raise ValueError(
                f"linrec: {name} is {given.dtype} on {given.device}, b is {b.dtype} on {b.device}; they must agree"
            )
    return _linrec(path, a[None, None] if a.ndim == 1 else a, b, h0, reverse)
