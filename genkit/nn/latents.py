"""Mean and standard deviation of latents, channel by channel, from batches."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_STD = 1e-4  # of the largest: a channel that does not move keeps a scale one can divide by


class LatentStats:
    """Sums over batches z [B, C, *grid], kept in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros(0, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        rows = z.detach().double().transpose(0, 1).flatten(1)  # [C, B * cells]
        self.total = rows.sum(1) + (self.total if self.count else 0)
        self.squares = rows.square().sum(1) + (self.squares if self.count else 0)
        self.count += rows.shape[1]

    def result(self) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation), [C] float32 each; the deviation at least 1e-4 of the largest."""
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        least = _LEAST_STD * float(std.max())
        return mean.float(), std.clamp_min(least if least > 0 else 1.0).float()
