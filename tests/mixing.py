"""Mixers of a tiny size, and tokens for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genkit.registry import build, check

DIM = 32
GRID = (7, 5)


def make(word: str, options: dict[str, Any] | None = None, layer: int = 0, dim: int = DIM, seed: int = 0) -> Any:
    """A mixer with every parameter off its starting value, so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    spec = check("mixer", {"type": word, **(options or {})}, "mixer")
    mixer = build("mixer", spec, dim=dim, layer=layer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def tokens(grid: tuple[int, ...] = GRID, batch: int = 2, dim: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(batch, math.prod(grid), dim, generator=torch.Generator().manual_seed(seed))
