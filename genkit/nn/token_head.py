"""A perceptron that denoises one token, given what a transformer says of it (Li et al., "Autoregressive Image Generation without Vector Quantization"
(MAR), NeurIPS 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genkit.interfaces import Cache, Predict
from genkit.nn.adaln import init_linears, init_zero
from genkit.nn.norm import modulate
from genkit.nn.timestep import TimeEmbedding


class ResidualBlock(nn.Module):
    """x + gate mlp(modulate(norm(x))), shift, scale and gate from the condition after its SiLU, [P, D] each."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return torch.addcmul(x, gate, self.down(nn.functional.silu(self.up(h))))


class TokenHead(nn.Module):
    """Noisy tokens [..., W], times [...], conditions [..., D] -> [..., 2 W]: the noise, and what variances are interpolated by. A fresh one returns 0.

    Args:
        channels: W.
        condition_dim: D.
        width, depth: of the perceptron; of MAR-B 1024 and 6, L 1280 and 8, H 1536 and 12.
    """

    def __init__(self, *, channels: int, condition_dim: int, width: int, depth: int):
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.condition = nn.Linear(condition_dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, 2 * channels)
        init_linears(self)
        self.time = TimeEmbedding(dim=width)
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            init_zero(block.modulation)
        init_zero(self.modulation)
        init_zero(self.linear)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        rows, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        c = self.time(t.expand(shape).reshape(-1), len(rows)) + self.condition(condition.reshape(len(rows), -1))
        c = nn.functional.silu(c)
        h = self.embed(rows)  # [P, width]
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(h, shift, scale)).view(*shape, -1)


@dataclass
class TokenPredictor:
    """A function that keeps to genkit.interfaces.PredictTokens, with the way from latents to tokens and back."""

    function: Callable[[Tensor, Tensor, Cache | None], Callable[[Tensor, Tensor], Predict]]
    split: Callable[[Tensor], Tensor]
    join: Callable[[Tensor], Tensor]

    def __call__(
        self, tokens: Tensor, known: Tensor, cache: Cache | None = None
    ) -> Callable[[Tensor, Tensor], Predict]:
        return self.function(tokens, known, cache)
