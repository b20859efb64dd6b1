"""Recursive gated convolution (HorNet, 2022): products of ever more depthwise-convolved channels, no attention."""

from __future__ import annotations

from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.grids import dense_grid, depthwise, spatially


class HorNet(nn.Module):
    """gnConv of Rao et al., "HorNet", NeurIPS 2022, eq. 3.2-3.5, on two-dimensional grids.

    With widths d_k = D / 2^(order - 1 - k): W_in x = [p | q] of D / 2^(order - 1) and sum d_k channels (2 D together),
    q <- scale * depthwise(q), split into q_0 .. q_{order - 1}; h = p q_0, then h <- (P_k h) q_k for k >= 1; W_out h.
    The published ImageNet models use order 2, 3, 4, 5 in their four stages and scale 1/3.

    Args:
        order: D must be divisible by 2^(order - 1).
        scale: of the convolved channels.
        kernel_size: odd, of the depthwise convolution.
    """

    is_causal = False
    needs_grid = True
    is_resolution_free = True

    def __init__(self, *, dim: int, layer: int, order: int = 5, scale: float = 1.0, kernel_size: int = 7):
        super().__init__()
        if order < 2 or dim % 2 ** (order - 1):
            raise UsageError(
                f"mixer.order={order} needs a width divisible by 2^(order - 1) = {2 ** max(order - 1, 1)} and to be at least 2, "
                f"found dim={dim}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"mixer.kernel_size={kernel_size} must be odd")
        self.widths = [dim // 2 ** (order - 1 - k) for k in range(order)]
        self.scale = scale
        self.proj_in = nn.Linear(dim, 2 * dim)
        self.conv = depthwise(sum(self.widths), kernel_size)
        self.widen = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.widths[:-1], self.widths[1:], strict=True))
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid = dense_grid(layout, "hornet", (2,))
        p, q = self.proj_in(x).split([self.widths[0], sum(self.widths)], dim=-1)
        gates = (spatially(self.conv, q, grid) * self.scale).split(self.widths, dim=-1)
        h = p * gates[0]
        for widen, gate in zip(self.widen, gates[1:], strict=True):
            h = widen(h) * gate
        return self.proj_out(h)
