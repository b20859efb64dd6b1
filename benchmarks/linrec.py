"""Elementwise recurrences and what stands on them: linrec and aaren against their plain-torch forms, FFT convolution against the direct one.

Memory is kept instead of given back to the system after every call: results above 32 MB would otherwise be fresh pages each time, and touching those for
the first time takes several times as long as the recurrence, on both sides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from genkit.bench import Case
from genkit.kernels.aaren.op import aaren
from genkit.kernels.fftconv.op import fftconv
from genkit.kernels.linrec.op import linrec

_B, _D = 2, 384
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def cases(quick: bool) -> Iterator[Case]:
    """linrec in the forward and in both directions; then the others."""
    _keep_memory()
    lengths = (256, 1024) if quick else (256, 1024, 4096, 16384)
    for N in lengths:
        a, b, h0 = torch.rand(_B, N, _D), torch.randn(_B, N, _D), torch.zeros(_B, _D)
        sides = [_forward(linrec, a, b, h0, path=path) for path in ("cpu", "torch")]
        yield Case(f"linrec forward {[_B, N, _D]}", "its blocked torch form", 2.5, *sides)
        sides = [_both(linrec, a, b, h0, path=path) for path in ("cpu", "torch")]
        yield Case(f"linrec forward + backward {[_B, N, _D]}", "its blocked torch form", 2.5, *sides)
    N = lengths[-1]
    shared = torch.rand(_D)
    sides = [_both(linrec, shared, b, h0, path=path) for path in ("cpu", "torch")]
    yield Case(f"linrec forward + backward, decay [{_D}], {[_B, N, _D]}", "its blocked torch form", 2.5, *sides)
    a, b = (torch.randn(_B, N, _D // 2, dtype=torch.complex64) for _ in range(2))
    a = a / (1 + a.abs())
    sides = [_both(linrec, a, b, torch.zeros_like(b[:, 0]), path=path) for path in ("cpu", "torch")]
    yield Case(f"linrec forward + backward, complex, {[_B, N, _D // 2]}", "its blocked torch form", 2.5, *sides)
    for N in lengths[-2:]:
        scores, v = torch.randn(_B, N, 6), torch.randn(_B, N, 6, 64)
        sides = [_forward(aaren, scores, v, path=path) for path in ("cpu", "torch")]
        yield Case(f"aaren forward {list(v.shape)}", "its blocked torch form", 2.5, *sides)
        sides = [_both(aaren, scores, v, path=path) for path in ("cpu", "torch")]
        yield Case(f"aaren forward + backward {list(v.shape)}", "its blocked torch form", 2.5, *sides)
    N = 1024
    u, kernel = torch.randn(_B, N, 64), torch.randn(N, 64)
    sides = [_forward(fftconv, u, kernel), _direct(u, kernel)]
    yield Case(f"fftconv with a kernel of {N} {[_B, N, 64]}", "torch.nn.functional.conv1d", 2, *sides)


def _forward(call: Callable[..., Any], *inputs: Tensor, **options: Any) -> Callable[[], Tensor]:
    return lambda: call(*inputs, **options)


def _both(call: Callable[..., Any], *inputs: Tensor, **options: Any) -> Callable[[], Any]:
    """The gradient of all inputs, of a fixed weighting of the result."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    weights = torch.randn_like(call(*inputs, **options))
    return lambda: torch.autograd.grad(call(*leaves, **options), leaves, weights)


def _direct(u: Tensor, kernel: Tensor) -> Callable[[], Tensor]:
    x, taps = u.mT.contiguous(), kernel.flip(0).T.unsqueeze(1).contiguous()
    N, D = kernel.shape
    return lambda: torch.nn.functional.conv1d(x, taps, padding=N - 1, groups=D)[..., :N]


def _keep_memory() -> None:
    """glibc only; elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
