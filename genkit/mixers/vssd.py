"""Non-causal state-space duality (VSSD, 2024): one global state that every token writes and reads, behind a 3x3 convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.vssd.op import vssd
from genkit.mixers.grids import dense_grid, depthwise, spatially, width_per_head
from genkit.mixers.mamba import step_bias
from genkit.nn.linear_map import Projection


class VSSD(nn.Module):
    """The mixer of Shi et al., "VSSD: Vision Mamba with Non-Causal State Space Duality", 2024, on two-dimensional grids.

    [z | x | B | C | dt] = W_in of E, E, G R, G R, H channels, E = expand D; x, B, C <- silu(depthwise 3x3);
    dt <- softplus(dt + dt_bias), S = sum_t dt_t e^(A_log) B_t x_t^T, y_t = S^T C_t + D x_t per head;
    W_out(LayerNorm(y) z), with no SiLU on z. Weights have the names and shapes of the published module. The published block adds a
    residual depthwise 3x3 in front of the mixer and one in front of its MLP, and uses plain attention in its last stage.

    Args:
        num_heads: of the E inner channels.
        num_groups: G; head h uses B and C of group h mod G.
        is_positive: tokens weigh dt e^(A_log), as above; False, as published for an ablation, turns the sign of S.
        kernel_size: of the depthwise convolution; odd.
        has_bias: of W_in and W_out.
        has_conv_bias: of the convolution.
    """

    is_causal = False
    needs_grid = True
    is_resolution_free = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int = 4,
        state_size: int = 64,
        expand: int = 2,
        num_groups: int = 1,
        is_positive: bool = True,
        kernel_size: int = 3,
        has_bias: bool = False,
        has_conv_bias: bool = True,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"mixer.kernel_size={kernel_size} must be odd")
        if state_size < 1 or expand < 1:
            raise UsageError(f"mixer.state_size={state_size} and mixer.expand={expand} must be at least 1")
        self.width = expand * dim
        self.head_dim = width_per_head(self.width, num_heads)
        if num_groups < 1 or num_heads % num_groups:
            raise UsageError(f"mixer.num_groups={num_groups} does not divide the {num_heads} heads")
        self.num_heads, self.num_groups, self.state_size = num_heads, num_groups, state_size
        self.sign = 1 if is_positive else -1
        convolved = self.width + 2 * num_groups * state_size
        self.in_proj = Projection(dim, self.width + convolved + num_heads, has_bias)
        self.conv2d = depthwise(convolved, kernel_size, has_conv_bias)
        self.dt_bias = nn.Parameter(step_bias(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.LayerNorm(self.width)
        self.out_proj = Projection(self.width, dim, has_bias)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid = dense_grid(layout, "vssd", (2,))
        states = self.num_groups * self.state_size
        z, xBC, dt = self.in_proj(x).split([self.width, self.width + 2 * states, self.num_heads], dim=-1)
        x, B, C = silu(spatially(self.conv2d, xBC, grid)).split([self.width, states, states], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))  # [B, N, H, V]
        B, C = (y.unflatten(-1, (self.num_groups, self.state_size)) for y in (B, C))  # [B, N, G, R] each
        weight = softplus(dt.to(self.dt_bias.dtype) + self.dt_bias) * (self.sign * self.A_log.exp())  # [B, N, H]
        y = vssd(C, B, x, weight, skip=self.D)
        return self.out_proj(self.norm(y.flatten(2)) * z)
