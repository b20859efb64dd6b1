"""Kernelised attention with learned relative positions, by FFT (Luo et al., 2021): O(N log N) on grids of one, two or three axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.grids import dense_grid, width_per_head


class RPEFFT(nn.Module):
    """Luo et al., "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding", NeurIPS 2021.

    o_i = sum_j e^(b_(j-i)) phi(q_i).phi(k_j) v_j / sum_j e^(b_(j-i)) phi(q_i).phi(k_j). Queries and keys are normalised to
    length 1 (theirs: what keeps the features stable) and phi are positive random features of the softmax kernel
    (Choromanski et al., 2021), phi(x)_r = exp(w_r.x - |x|^2 / 2) / sqrt(R). The sums over j are correlations with e^b: a
    (block) Toeplitz product, done by FFT over the grid with R (K + 1) channels per head. That memory makes it worth while
    on long sequences alone. Queries are scaled by a learned temperature per head (ours, 1 at first).

    Args:
        size: the largest grid, one length per axis; b has prod(2 size - 1) entries per head.
        num_features: R; None = K. The random w are drawn once and saved with the weights.
    """

    is_causal = False
    needs_grid = True
    is_resolution_free = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int = 4,
        size: tuple[int, ...] = (16, 16),
        num_features: int | None = None,
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width_per_head(dim, num_heads)
        if len(size) not in (1, 2, 3) or min(size) < 1:
            raise UsageError(f"mixer.size={list(size)} must be one, two or three positive lengths")
        if num_features is not None and num_features < 1:
            raise UsageError(f"mixer.num_features={num_features} must be at least 1")
        self.size = tuple(size)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, *(2 * s - 1 for s in size)))
        self.proj = nn.Linear(dim, dim)
        self.directions: Tensor  # w, [H, R, K]
        self.register_buffer("directions", _orthogonal(num_heads, num_features or self.head_dim, self.head_dim))

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid = dense_grid(layout, "rpe_fft", (len(self.size),))
        if any(length > size for length, size in zip(grid, self.size, strict=True)):
            raise UsageError(f"mixer.type=rpe_fft: the grid {list(grid)} is larger than mixer.size={list(self.size)}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, N, H, K] each
        dtype = torch.promote_types(x.dtype, torch.float32)  # no FFT of half-precision numbers
        with torch.autocast(x.device.type, enabled=False):
            q = self.features(normalize(q.to(dtype), dim=-1) * self.temperature)  # [B, N, H, R]
            k, v = self.features(normalize(k.to(dtype), dim=-1)), v.to(dtype)
            ones = torch.ones_like(v[..., :1])
            summed = k.unsqueeze(-1) * torch.cat([v, ones], dim=-1).unsqueeze(-2)  # [B, N, H, R, K + 1]
            around = self.correlate(summed, grid)
            out = torch.einsum("bnhr,bnhrk->bnhk", q, around)
        attended = (out[..., :-1] / out[..., -1:]).flatten(2)
        return self.proj(attended.to(x.dtype))

    def features(self, x: Tensor) -> Tensor:
        """phi: [B, N, H, K] -> [B, N, H, R], positive."""
        projected = torch.einsum("bnhk,hrk->bnhr", x, self.directions.to(x.dtype))
        return (projected - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(self.directions.shape[1])

    def correlate(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """sum_j e^(b_(j-i)) x_j for x [B, N, H, R, K + 1]."""
        kernel = self.bias[(slice(None), *(slice(s - n, s + n - 1) for s, n in zip(self.size, grid, strict=True)))]
        # A common factor of e^b cancels in the quotient.
        kernel = (kernel - kernel.flatten(1).amax(1).view(-1, *[1] * len(grid)).detach()).exp().to(x.dtype)
        padded = [_smooth(2 * n - 1) for n in grid]  # what wraps round falls outside the n places that are read
        axes = tuple(range(1, 1 + len(grid)))
        kernel = kernel.flip(axes)  # correlation = convolution with the kernel turned round
        spectrum = torch.fft.rfftn(kernel, s=padded, dim=axes).movedim(0, len(grid))  # [*padded, H]
        x = x.unflatten(1, grid)
        product = torch.fft.rfftn(x, s=padded, dim=axes) * spectrum[..., None, None]
        full = torch.fft.irfftn(product, s=padded, dim=axes)
        inner = full[(slice(None), *(slice(n - 1, 2 * n - 1) for n in grid))]
        return inner.flatten(1, len(grid))


def _smooth(length: int) -> int:
    """The first number from length on without prime factors above 5: an FFT of a prime length takes half as long again."""
    rest = length
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    return length if rest == 1 else _smooth(length + 1)


def _orthogonal(num_heads: int, num_features: int, head_dim: int) -> Tensor:
    """Random directions [H, R, K], orthogonal within blocks of K, as long as Gaussian vectors (Choromanski et al., 2021)."""
    blocks = -(-num_features // head_dim)
    q, _ = torch.linalg.qr(torch.randn(num_heads, blocks, head_dim, head_dim))
    lengths = torch.randn(num_heads, blocks, head_dim, head_dim).norm(dim=-1, keepdim=True)
    return (q.transpose(-2, -1) * lengths).flatten(1, 2)[:, :num_features].contiguous()
