"""The state space of Mamba-2 (2024): one decay per head and token, scanning the tokens of a grid in any order, one way or both."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.causal_conv1d.op import causal_conv1d
from genkit.kernels.ssd.op import ssd
from genkit.mixers.grids import dense_grid, refuse_padding
from genkit.mixers.mamba import step_bias
from genkit.nn.linear_map import Projection
from genkit.nn.norm import RMSNorm
from genkit.nn.scan_orders import scan_order, schedule


class SSD(nn.Module):
    """The mixer of Dao and Gu, "Transformers are SSMs", ICML 2024.

    [z | x | B | C | dt] = W_in of E, E, G R, G R, H channels, E = expand D; x, B, C <- silu(causal depthwise conv);
    dt <- softplus(dt + dt_bias); S_t = exp(-dt_t e^(A_log)) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t per head;
    W_out(RMSNorm(y silu(z))). Weights have the names and shapes of the published module; what belongs to a direction is under `scans.0.`
    (and `scans.1.` for the way back, ours in the manner of Vim).

    Args:
        head_dim: P, channels of E per head; None = a quarter of E, at most 64.
        num_groups: G, of heads that share B and C.
        order, is_bidirectional: as in mamba.
    """

    is_resolution_free = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        state_size: int = 64,
        expand: int = 2,
        head_dim: int | None = None,
        num_groups: int = 1,
        conv_width: int = 4,
        order: str | list[str] = "raster",
        is_bidirectional: bool = False,
    ):
        super().__init__()
        if state_size < 1 or expand < 1 or not 2 <= conv_width <= 8:
            raise UsageError(
                f"mixer.state_size={state_size} and mixer.expand={expand} must be at least 1, mixer.conv_width={conv_width} in 2 .. 8"
            )
        self.width = expand * dim
        head_dim = min(64, max(1, self.width // 4)) if head_dim is None else head_dim
        if head_dim < 1 or self.width % head_dim:
            raise UsageError(f"mixer.head_dim={head_dim} does not divide the inner width {self.width}")
        self.num_heads = self.width // head_dim
        if num_groups < 1 or self.num_heads % num_groups:
            raise UsageError(f"mixer.num_groups={num_groups} does not divide the {self.num_heads} heads")
        self.layer, self.order = layer, schedule(order, layer)
        self.num_groups, self.state_size = num_groups, state_size
        self.needs_grid = self.order != "raster"
        self.is_causal = not is_bidirectional and self.order == "raster"
        convolved = self.width + 2 * num_groups * state_size
        self.in_proj = Projection(dim, self.width + convolved + self.num_heads)
        self.scans = nn.ModuleList(
            Scan(self.width, self.num_heads, num_groups, state_size, conv_width, is_reversed=back)
            for back in (False, True)[: 1 + is_bidirectional]
        )
        self.norm = RMSNorm(self.width, eps=1e-5)
        self.out_proj = Projection(self.width, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        refuse_padding(layout, "ssd")
        z, rest = self.in_proj(x).tensor_split([self.width], dim=-1)
        if self.is_causal:
            return self.out_proj(self.norm(self.step(rest, cache) * silu(z)))
        grid = dense_grid(layout, "ssd") if self.needs_grid else (x.shape[1],)
        order = scan_order(self.order, grid, x.device)
        rest = order.visit(rest)
        y = self.scans[0](rest)[0]
        for scan in self.scans[1:]:
            y = y + scan(rest)[0]
        return self.out_proj(self.norm(order.put_back(y) * silu(z)))

    def step(self, rest: Tensor, cache: Cache | None) -> Tensor:
        """One way along the sequence, from where the cache says it stands."""
        before = None if cache is None else cache.get(self.layer)
        y, *state = self.scans[0](rest, *(before or ()))
        if cache is not None:
            cache[self.layer] = tuple(s.detach() for s in state)
        return y


class Scan(nn.Module):
    """[x | B | C | dt] [B, N, E + 2 G R + H] -> (y [B, N, E], state of the convolution, state of the scan), in one direction."""

    def __init__(
        self, width: int, num_heads: int, num_groups: int, state_size: int, conv_width: int, *, is_reversed: bool
    ):
        super().__init__()
        self.width, self.num_heads, self.is_reversed = width, num_heads, is_reversed
        self.num_groups, self.state_size = num_groups, state_size
        convolved = width + 2 * num_groups * state_size
        self.conv1d = nn.Conv1d(convolved, convolved, conv_width, groups=convolved)
        self.dt_bias = nn.Parameter(step_bias(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(num_heads))

    def forward(
        self, rest: Tensor, tokens: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        xBC, dt = rest.tensor_split([rest.shape[-1] - self.num_heads], dim=-1)
        xBC, tokens = cast(
            "tuple[Tensor, Tensor]",
            causal_conv1d(
                xBC,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                "silu",
                initial_state=tokens,
                reverse=self.is_reversed,
                return_state=True,
            ),
        )
        x, B, C = xBC.split([self.width, *[self.num_groups * self.state_size] * 2], dim=-1)
        x = x.unflatten(-1, (self.num_heads, -1))  # [B, N, H, P]
        B, C = (y.unflatten(-1, (self.num_groups, self.state_size)) for y in (B, C))  # [B, N, G, R] each
        dt = softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # [B, N, H], at least float32
        y, state = cast(
            "tuple[Tensor, Tensor]",
            ssd(
                C,
                B,
                x,
                -dt * self.A_log.exp(),
                dt=dt,
                skip=self.D,
                initial_state=state,
                reverse=self.is_reversed,
                return_state=True,
            ),
        )
        return y.flatten(2), tokens, state
