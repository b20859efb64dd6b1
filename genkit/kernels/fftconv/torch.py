"""Long convolution by FFT: the product of spectra is the circular convolution, which is the linear one where the length leaves room."""

from __future__ import annotations

import torch
from torch import Tensor


def fftconv(u: Tensor, kernel: Tensor, is_causal: bool) -> Tensor:
    """As `reference.fftconv`."""
    if u.dtype in (torch.bfloat16, torch.float16):
        return fftconv(u.float(), kernel.float(), is_causal).to(u.dtype)
    grid = u.shape[1:-1]
    lengths, firsts = [], []
    for axis, size in enumerate(grid):
        given = kernel.shape[axis]
        first = 0 if is_causal else given // 2
        # Taps that never meet a token of u.
        least, most = max(0, first - size + 1), min(given, first + size)
        kernel = kernel.narrow(axis, least, most - least)
        firsts.append(first - least)
        # Of the linear convolution's size + L - 1 values the first `first` are not wanted, and may be what wraps around.
        lengths.append(_smooth(max(size + kernel.shape[axis] - 1 - firsts[-1], firsts[-1] + size)))
    x = u.movedim(-1, 1)  # [B, D, *grid]: transforms run along what lies innermost
    axes = tuple(range(-len(grid), 0))
    spectrum = torch.fft.rfftn(x, lengths, dim=axes) * torch.fft.rfftn(kernel.movedim(-1, 0), lengths, dim=axes)
    y = torch.fft.irfftn(spectrum, lengths, dim=axes)
    for axis, (first, size) in enumerate(zip(firsts, grid, strict=True)):
        y = y.narrow(2 + axis, first, size)
    return y.movedim(1, -1).contiguous()


def _smooth(least: int) -> int:
    """The smallest even 2^a 3^b 5^c that is at least this: lengths with other factors transform slowly, odd ones have no real transform of half size."""
    best = 2 ** max(1, (least - 1).bit_length())
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            number = 2 * threes
            while number < least:
                number *= 2
            best = min(best, number)
            threes *= 3
        fives *= 5
    return best
