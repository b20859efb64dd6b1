"""Positions by Toeplitz mixing along every axis of a grid: MD-TPE (Qin et al., "LightNet", 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkit.errors import UsageError


class ToeplitzPositions(nn.Module):
    """y_n = sum over the axes j of sum_m t_j(n_j - m) x_(.. m ..), per channel; x [B, N, D] on a dense grid -> [B, N, D].

    The kernels are sums of decaying exponentials, t(tau) = sum_e b_e lambda_e^tau for tau >= 0 with lambda in (0, 1), so that they fit any length;
    "both" directions have a second one for tau < 0 (ours; a kernel for tau >= 0 alone, as published, looks one way). Done by FFT in
    float32 or wider: O(N log N).

    Args:
        num_axes: A, of the grids it will work on.
        num_terms: exponentials per kernel and channel.
    """

    def __init__(self, *, dim: int, num_axes: int = 2, num_terms: int = 4, is_causal: bool = False):
        super().__init__()
        if num_axes < 1 or num_terms < 1:
            raise UsageError(
                f"Toeplitz positions need axes and terms, found num_axes={num_axes}, num_terms={num_terms}"
            )
        directions = 1 if is_causal else 2
        self.num_axes, self.is_causal = num_axes, is_causal
        self.weight = nn.Parameter(
            torch.randn(num_axes, directions, dim, num_terms) / (num_axes * num_terms) ** 0.5 / 2
        )
        # Half-lives of 1 to about 10 tokens.
        self.logit = nn.Parameter(torch.linspace(0, 2.7, num_terms).repeat(num_axes, directions, dim, 1))

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        if len(grid) != self.num_axes:
            raise UsageError(f"Toeplitz positions of {self.num_axes} axes on the grid {list(grid)}")
        wide = torch.promote_types(x.dtype, torch.float32)  # no FFT of half-precision numbers
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(wide).unflatten(1, grid)
            y = torch.zeros_like(h)
            for axis, length in enumerate(grid):
                spectrum = torch.fft.rfft(self.kernel(axis, length).to(wide), dim=0)  # [length + 1 at most, D]
                spectrum = spectrum.view(*[1] * (axis + 1), -1, *[1] * (len(grid) - 1 - axis), x.shape[-1])
                mixed = torch.fft.rfft(h, n=2 * length, dim=1 + axis) * spectrum
                y = y + torch.fft.irfft(mixed, n=2 * length, dim=1 + axis).narrow(1 + axis, 0, length)
        return y.flatten(1, len(grid)).to(x.dtype)

    def kernel(self, axis: int, length: int) -> Tensor:
        """[2 length, D]: t(0) .. t(length - 1), 0, t(1 - length) .. t(-1), as a circular convolution takes it."""
        steps = torch.arange(length, device=self.weight.device)
        powers = self.logit[axis].sigmoid().unsqueeze(0) ** steps.view(-1, 1, 1, 1)  # [length, directions, D, E]
        sides = (self.weight[axis] * powers).sum(-1)  # [length, directions, D]
        past = sides[:, 0]
        if self.is_causal:
            return torch.cat([past, torch.zeros_like(past)])
        return torch.cat([past, torch.zeros_like(past[:1]), sides[1:, 1].flip(0)])  # t(0) belongs to the first
