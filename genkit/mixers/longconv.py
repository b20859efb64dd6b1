"""Long convolution (2023): every channel convolved with a learned kernel as long as the sequence or the image, by FFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, relu

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.fftconv.op import fftconv
from genkit.mixers.grids import grid_of


class LongConv(nn.Module):
    """Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", 2023: GLU(W gelu(k * x + skip x)).

    The kernel is the parameter itself, made sparse by a soft threshold, relu(|k| - threshold) sign(k). Offsets it does not reach count for
    nothing. What is at padding reads as 0.

    Args:
        size: how far the kernel reaches: one number of tokens along the sequence, or one per axis (Y, X) of an image.
        is_causal: a token sees itself and the size - 1 before it; only along the sequence. Otherwise both ways.
        threshold: lambda of the paper, which tunes it per task to the size of the weights; 0 = none.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        size: tuple[int, ...] = (16, 16),
        is_causal: bool = False,
        threshold: float = 0.0,
    ):
        super().__init__()
        if len(size) not in (1, 2) or min(size) < 1:
            raise UsageError(f"mixer.size={list(size)} must be one length (sequence) or two (image), positive")
        if is_causal and len(size) > 1:
            raise UsageError("mixer.is_causal=true needs mixer.size of one length: an image has no order")
        if threshold < 0:
            raise UsageError(f"mixer.threshold={threshold} must not be negative")
        self.layer, self.is_causal, self.threshold, self.num_axes = layer, is_causal, threshold, len(size)
        self.needs_grid = len(size) > 1  # padded or not
        self.is_resolution_free = True
        lengths = [s if is_causal else 2 * s - 1 for s in size]
        self.kernel = nn.Parameter(torch.randn(*lengths, dim) * 0.002)  # as published
        self.skip = nn.Parameter(torch.randn(dim))
        self.proj = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        if layout.valid is not None:
            x = x.masked_fill(~layout.valid.unsqueeze(-1), 0)
        kernel: Tensor = self.kernel
        if self.threshold:
            kernel = relu(kernel.abs() - self.threshold) * kernel.sign()
        kernel = kernel.to(x.dtype)
        if self.num_axes > 1:
            mixed = fftconv(x.unflatten(1, grid_of(layout, "longconv", (2,))), kernel, is_causal=False).flatten(1, 2)
        elif self.is_causal and cache is not None:
            seen = torch.cat([cache.get(self.layer, x[:, :0]), x], dim=1)
            mixed = fftconv(seen, kernel)[:, -x.shape[1] :]
            cache[self.layer] = seen[:, max(0, seen.shape[1] - kernel.shape[0] + 1) :].detach()
        else:
            mixed = fftconv(x, kernel, is_causal=self.is_causal)
        return glu(self.proj(gelu(mixed + self.skip * x)), dim=-1)
