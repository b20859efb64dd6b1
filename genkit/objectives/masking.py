"""How much of a sample is masked in training."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_normal(u: Tensor, mean: float, std: float, low: float, high: float = 1.0) -> Tensor:
    """Uniform numbers u in [0, 1) -> N(mean, std^2) within [low, high], by the inverse of its distribution function.

    MAGE (Li et al., 2023) masks fractions with mean 0.55 and std 0.25 in [0.5, 1], MAR (Li et al., 2024) with mean 1 and std 0.25 in [0.7, 1].
    """
    a, b = (torch.special.ndtr(torch.tensor((end - mean) / std, dtype=torch.float64)) for end in (low, high))
    return (mean + std * torch.special.ndtri(a + u.double() * (b - a))).clamp(low, high).to(u.dtype)


def ranks(rng_order: Tensor, valid: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """A random permutation [B, N] of the valid tokens, padding behind all of them, and how many are valid, [B] or N."""
    N = rng_order.shape[1]
    if valid is None:
        return rng_order, N
    return torch.where(valid, rng_order, N).argsort(dim=1, stable=True).argsort(dim=1), valid.sum(1)
