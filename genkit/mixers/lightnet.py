"""LightNet (2024): linear attention through a softmax over the tokens, all at once in no order, or causal."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.lightnet.op import lightnet
from genkit.mixers.grids import dense_grid, width_per_head
from genkit.nn.linear_map import Projection
from genkit.nn.lrpe import FLAVOURS, lrpe_angles, lrpe_factors
from genkit.nn.norm import RMSNorm
from genkit.nn.tpe import ToeplitzPositions


class LightNet(nn.Module):
    """Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", 2024.

    Q = silu(W_q x), K = softmax over tokens (causal: over each prefix) of W_k x, V = W_v x; positions on Q and K; O = Q (K^T V) per
    head; W_o(RMSNorm(O) silu(W_2 W_1 x)). In the causal form positions too are on the softmax over the prefix (theirs are on a key whose two
    turned channels decay differently). Without positions the non-causal form does not know the order of the tokens. Padding takes no part.
    The published code was not to be had: norm and gate follow the layer of flash-linear-attention, the rest the paper's equations.

    Args:
        positions: "rotary" or "cosine" MD-LRPE on queries and keys (nn/lrpe.py), or None.
        toeplitz_axes: MD-TPE (nn/tpe.py) of grids with so many axes is added to the input of layer 0; 0 = none. Not causal.
        gate_rank: channels between W_1 and W_2; None = D / num_heads.
        is_causal: each token sees itself and the tokens before it.
    """

    is_resolution_free = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int = 4,
        positions: Literal["rotary", "cosine"] | None = "rotary",
        rope_base: float = 10_000.0,
        toeplitz_axes: int = 0,
        gate_rank: int | None = None,
        is_causal: bool = False,
    ):
        super().__init__()
        if positions is not None and positions not in FLAVOURS:
            raise UsageError(f"mixer.positions={positions!r} must be {' or '.join(FLAVOURS)} or null")
        if is_causal and toeplitz_axes:
            raise UsageError("mixer.toeplitz_axes mixes tokens both ways; it does not go with mixer.is_causal=true")
        self.layer, self.num_heads, self.head_dim = layer, num_heads, width_per_head(dim, num_heads)
        self.positions, self.rope_base, self.is_causal = positions, rope_base, is_causal
        self.q_proj, self.k_proj, self.v_proj = (Projection(dim, dim) for _ in range(3))
        rank = self.head_dim if gate_rank is None else gate_rank
        if rank < 1:
            raise UsageError(f"mixer.gate_rank={rank} must be at least 1")
        self.g_proj = nn.Sequential(Projection(dim, rank), Projection(rank, dim))
        self.norm = RMSNorm(dim)
        self.o_proj = Projection(dim, dim)
        is_first = toeplitz_axes > 0 and layer == 0
        self.toeplitz = ToeplitzPositions(dim=dim, num_axes=toeplitz_axes) if is_first else None
        self.needs_grid = is_first

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        if self.toeplitz is not None:
            x = x + self.toeplitz(x, dense_grid(layout, "lightnet", (self.toeplitz.num_axes,)))
        q, g, v = (
            proj(x).unflatten(-1, (self.num_heads, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, N, H, K] each
        q, k = silu(q), None
        if self.positions is not None:
            angles = lrpe_angles(layout.coords, self.head_dim, self.positions, self.rope_base)
            q, k = lrpe_factors(q, angles, self.positions)
            q, g, k = q.to(v.dtype), torch.cat([g, g], dim=-1), k.to(v.dtype).expand_as(q)
        before = None if cache is None or not self.is_causal else cache.get(self.layer)
        o = lightnet(q, g, v, k, is_causal=self.is_causal, mask=layout.valid, state=before, return_state=self.is_causal)
        if not isinstance(o, Tensor):
            o, state = o
            if cache is not None:
                cache[self.layer] = tuple(s.detach() for s in state)
        return self.o_proj(self.norm(o.flatten(2)) * silu(self.g_proj(x)))
