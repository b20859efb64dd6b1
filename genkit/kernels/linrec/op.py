"""Elementwise linear recurrence h_t = a_t h_{t-1} + b_t, the base of S5, ConvS5, exponential averages and other diagonal state spaces."""

from __future__ import annotations

from torch import Tensor

from genkit.dispatch import Operation

_linrec = Operation("linrec")


def linrec(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False, path: str | None = None) -> Tensor:
    """h [B, N, D] with h_t = a_t h_{t-1} + b_t.

    Args:
        a: [B, N, D], the decay. Differentiable, as b and h0.
        b: [B, N, D], the input, same dtype and device.
        h0: [B, D], the state before the first step; None = 0.
        reverse: the recurrence runs from the last token to the first, and h0 stands behind the last.
        path: see genkit.dispatch.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if b.ndim != 3 or b.shape[1] < 1:
        raise ValueError(f"linrec: b must be [B, N, D] with N >= 1, got {list(b.shape)}")
    B, _, D = b.shape
    h0 = b.new_zeros(B, D) if h0 is None else h0
    for name, given, shape in (("a", a, b.shape), ("h0", h0, (B, D))):
        if given.shape != shape:
            raise ValueError(f"linrec: {name} must be {list(shape)} to go with b, got {list(given.shape)}")
        if given.dtype != b.dtype or given.device != b.device:
            raise ValueError(
                f"linrec: {name} is {given.dtype} on {given.device}, b is {b.dtype} on {b.device}; they must agree"
            )
    return _linrec(path, a, b, h0, reverse)
