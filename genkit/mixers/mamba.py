"""The selective state space of Mamba (2023), scanning the tokens of a grid in any order, one way or both."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.causal_conv1d.op import causal_conv1d
from genkit.kernels.selective_scan.op import selective_scan
from genkit.mixers.grids import dense_grid, refuse_padding
from genkit.nn.linear_map import Projection
from genkit.nn.scan_orders import scan_order, schedule


class Mamba(nn.Module):
    """The mixer of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.

    [u | z] = W_in x of E = expand D channels each; u <- silu(causal depthwise conv of u); [r | B | C] = W_x u;
    Delta = softplus(W_dt r + b_dt), A = -exp(A_log); h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t, y_t = C_t . h_t + D u_t;
    W_out (y silu(z)). Weights have the names and shapes of the published module; what belongs to a direction is under `scans.0.`
    (and `scans.1.` for the way back: Vim, Zhu et al., 2024).

    Args:
        state_size: R, of h per channel.
        order: how the scan visits the grid, see nn/scan_orders.py; a list, or the name of a schedule, goes through the layers.
        is_bidirectional: a second scan from the last token to the first, with parameters of its own; its y is added.
    """

    is_resolution_free = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        state_size: int = 16,
        expand: int = 2,
        conv_width: int = 4,
        order: str | list[str] = "raster",
        is_bidirectional: bool = False,
    ):
        super().__init__()
        if not 1 <= state_size <= 256:
            raise UsageError(f"mixer.state_size={state_size} must be in 1 .. 256")
        if expand < 1 or not 2 <= conv_width <= 8:
            raise UsageError(f"mixer.expand={expand} must be at least 1, mixer.conv_width={conv_width} in 2 .. 8")
        self.layer, self.order = layer, schedule(order, layer)
        self.needs_grid = self.order != "raster"
        self.is_causal = not is_bidirectional and self.order == "raster"
        self.in_proj = Projection(dim, 2 * expand * dim)
        self.scans = nn.ModuleList(
            SelectiveScan(
                width=expand * dim, rank=-(-dim // 16), state_size=state_size, conv_width=conv_width, is_reversed=back
            )
            for back in (False, True)[: 1 + is_bidirectional]
        )
        self.out_proj = Projection(expand * dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        refuse_padding(layout, "mamba")
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, N, E] each
        if self.is_causal:
            return self.out_proj(self.step(u, z, cache))
        grid = dense_grid(layout, "mamba") if self.needs_grid else (x.shape[1],)
        order = scan_order(self.order, grid, x.device)
        u, z = order.visit(u), order.visit(z)
        y = self.scans[0](u, z)[0]
        for scan in self.scans[1:]:
            y = y + scan(u, z)[0]
        return self.out_proj(order.put_back(y))

    def step(self, u: Tensor, z: Tensor, cache: Cache | None) -> Tensor:
        """One way along the sequence, from where the cache says it stands."""
        before = None if cache is None else cache.get(self.layer)
        y, *state = self.scans[0](u, z, *(before or ()))
        if cache is not None:
            cache[self.layer] = tuple(s.detach() for s in state)
        return y


class SelectiveScan(nn.Module):
    """Convolution, selection and scan in one direction: u, z [B, N, E] -> (y silu(z), state of the convolution, state of the scan)."""

    undecayed = ("A_log",)  # as published

    def __init__(self, *, width: int, rank: int, state_size: int, conv_width: int, is_reversed: bool):
        super().__init__()
        self.rank, self.state_size, self.is_reversed = rank, state_size, is_reversed
        self.conv1d = nn.Conv1d(width, width, conv_width, groups=width)
        self.x_proj = Projection(width, rank + 2 * state_size)
        self.dt_proj = StepSizes(rank, width)
        self.A_log = nn.Parameter(torch.arange(1, state_size + 1, dtype=torch.float32).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))

    def forward(
        self, u: Tensor, z: Tensor, tokens: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, tokens = cast(
            "tuple[Tensor, Tensor]",
            causal_conv1d(
                u,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                "silu",
                initial_state=tokens,
                reverse=self.is_reversed,
                return_state=True,
            ),
        )
        r, B, C = self.x_proj(u).split([self.rank, self.state_size, self.state_size], dim=-1)
        y, state = cast(
            "tuple[Tensor, Tensor]",
            selective_scan(
                u,
                linear(r, self.dt_proj.weight).to(u.dtype),
                -self.A_log.exp(),
                B.to(u.dtype),
                C.to(u.dtype),
                self.D,
                z.to(u.dtype),
                self.dt_proj.bias,
                delta_softplus=True,
                initial_state=state,
                reverse=self.is_reversed,
                return_state=True,
            ),
        )
        return y, tokens, state


class StepSizes(nn.Module):
    """Weight and bias of W_dt. No nn.Linear: blocks initialise those they contain, and the step sizes must keep their start."""

    def __init__(self, rank: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.bias = nn.Parameter(step_bias(width))


def step_bias(width: int) -> Tensor:
    """[width], softplus of which is log-uniform in [1e-3, 0.1]: the step sizes at the start, as published."""
    dt = torch.empty(width).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
    return dt + (-torch.expm1(-dt)).log()
