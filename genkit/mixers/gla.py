"""Gated linear attention (Yang et al., 2024): a matrix state per head with learned decay per key channel; causal, constant memory per token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.gla.op import gla
from genkit.mixers.grids import width_per_head
from genkit.nn.linear_map import Projection
from genkit.nn.norm import RMSNorm


class GLA(nn.Module):
    """The layer of Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", ICML 2024, section 4.4.

    Keys are half as wide as D, values as wide; log gates are logsigmoid(W_2 W_1 x) / 16 by way of gate_rank channels; the output is
    RMS-normed per head and gated by silu(W_g x). Tokens are taken in their order. Padding changes no state.

    Args:
        gate_divisor: 16 makes the decay at the start 0.96 per token.
    """

    is_causal = True
    needs_grid = False
    is_resolution_free = True

    def __init__(self, *, dim: int, layer: int, num_heads: int = 4, gate_rank: int = 16, gate_divisor: float = 16.0):
        super().__init__()
        if dim % 2:
            raise UsageError(f"mixer.type=gla: keys are half as wide as dim={dim}, which is odd")
        if gate_rank < 1 or gate_divisor <= 0:
            raise UsageError(
                f"mixer.gate_rank={gate_rank} must be at least 1, mixer.gate_divisor={gate_divisor} positive"
            )
        self.layer, self.num_heads, self.gate_divisor = layer, num_heads, gate_divisor
        self.head_dim, self.key_dim = width_per_head(dim, num_heads), width_per_head(dim // 2, num_heads)
        self.q_proj, self.k_proj = Projection(dim, dim // 2), Projection(dim, dim // 2)
        self.v_proj, self.g_proj = Projection(dim, dim), Projection(dim, dim)
        self.gate = nn.Sequential(Projection(dim, gate_rank), nn.Linear(gate_rank, dim // 2))
        self.norm = RMSNorm(self.head_dim, eps=1e-5)
        self.o_proj = Projection(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q, k = (proj(x).unflatten(-1, (self.num_heads, self.key_dim)) for proj in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, self.head_dim))  # [B, N, H, V]
        gate = self.gate(x).unflatten(-1, (self.num_heads, self.key_dim))
        g = logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / self.gate_divisor  # [B, N, H, K]
        if layout.valid is not None:
            is_valid = layout.valid[:, :, None, None]
            k, g = k.masked_fill(~is_valid, 0), g.masked_fill(~is_valid, 0)
        before = None if cache is None else cache.get(self.layer)
        o, state = cast("tuple[Tensor, Tensor]", gla(q, k, v, g, initial_state=before, return_state=True))
        if cache is not None:
            cache[self.layer] = state.detach()
        return self.o_proj((self.norm(o) * silu(self.g_proj(x)).unflatten(-1, (self.num_heads, -1))).flatten(2))
