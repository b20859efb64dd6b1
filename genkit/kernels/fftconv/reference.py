"""Long convolution as the sum it is: the specification that faster paths are compared with."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def fftconv(u: Tensor, kernel: Tensor, is_causal: bool) -> Tensor:
    """As `op.fftconv`, arguments checked."""
    if u.dtype in (torch.bfloat16, torch.float16):
        return fftconv(u.float(), kernel.float(), is_causal).to(u.dtype)
    grid, lengths = u.shape[1:-1], kernel.shape[:-1]
    first = [0 if is_causal else length // 2 for length in lengths]  # u_{t - j + first}
    margins = [m for length, f in zip(reversed(lengths), reversed(first), strict=True) for m in (length - 1 - f, f)]
    padded = torch.nn.functional.pad(u, (0, 0, *margins))
    y = torch.zeros_like(u)
    for j in itertools.product(*map(range, lengths)):
        window = tuple(slice(n - 1 - i, n - 1 - i + size) for i, n, size in zip(j, lengths, grid, strict=True))
        y = y + kernel[j] * padded[(slice(None), *window)]
    return y
