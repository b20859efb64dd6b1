"""Time as a vector (Ho et al., "DDPM", 2020; Peebles and Xie, "DiT", 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def time_waves(t: Tensor, num_waves: int, shift: int = 0) -> Tensor:
    """t [B] -> [B, num_waves] float32: cosines, then sines, of t * 10000^(-i / (half - shift)), i = 0 .. half - 1, half = num_waves / 2.

    Args:
        shift: 0 as in DiT and SiT; 1 as diffusers' models of the same name are trained with: the slowest wave is then exactly 1/10000.
    """
    half = num_waves // 2
    # Rounded in this order, as where weights come from: at t = 999 another order moves an angle by 6e-5.
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t, a number or one per sample [B], -> [B, dim]: 256 waves through a perceptron with a SiLU.

    Args:
        scale: t is multiplied by it. The waves were made for steps 0 .. 999; of times in [0, 1] most of them see hardly anything.
        shift: see time_waves.

    Raises: ValueError for a t of another shape.
    """

    def __init__(self, *, dim: int, num_waves: int = 256, shift: int = 0, scale: float = 1.0):
        super().__init__()
        self.num_waves, self.shift, self.scale = num_waves, shift, scale
        self.up = nn.Linear(num_waves, dim)
        self.down = nn.Linear(dim, dim)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)  # as DiT
            nn.init.zeros_(linear.bias)

    def forward(self, t: Tensor, batch_size: int) -> Tensor:
        if t.ndim and t.shape != (batch_size,):
            raise ValueError(f"t is {list(t.shape)}, expected a number or one per sample, [{batch_size}]")
        waves = time_waves(self.scale * t.float().expand(batch_size), self.num_waves, self.shift)
        return self.down(nn.functional.silu(self.up(waves.to(self.up.weight.dtype))))
