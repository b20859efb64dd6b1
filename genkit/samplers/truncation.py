"""Which ids may be drawn, and which one is: temperature, top-k, top-p (Holtzman et al., 2020), min-p (Nguyen et al., 2024), in this order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.errors import UsageError


@dataclass(frozen=True)
class Truncation:
    """How logits become a distribution. See samplers/autoregressive.py."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"sampler.temperature={self.temperature} must not be negative")
        if self.top_k < 0:
            raise UsageError(f"sampler.top_k={self.top_k} must not be negative; 0 = all ids")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"sampler.top_p={self.top_p} must be above 0 and at most 1; 1 = all ids")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"sampler.min_p={self.min_p} must be in [0, 1]; 0 = all ids")


def truncate(logits: Tensor, how: Truncation) -> Tensor:
    """Logits [..., S] divided by the temperature, -inf where an id may not be drawn. The temperature must not be 0."""
    if how.temperature != 1:
        logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        least = logits.topk(how.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if how.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1, dtype=torch.float32)
        dropped = p.cumsum(-1) - p > how.top_p  # the sum before this id is already above: the first always stays
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    if how.min_p > 0:
        p = logits.softmax(-1, dtype=torch.float32)
        logits = logits.masked_fill(p < how.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor, how: Truncation) -> Tensor:
    """Ids [...] from logits [..., S] by numbers [...] in [0, 1): the first id at which the cumulative probability exceeds the number."""
    if how.temperature == 0:
        return logits.argmax(-1)
    cumulative = truncate(logits, how).softmax(-1, dtype=torch.float32).cumsum(-1)
    # A number below 1 leaves room below the total: no id of probability zero is ever drawn.
    wanted = uniform.unsqueeze(-1) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, wanted.contiguous(), right=True).squeeze(-1)
    return drawn.clamp_max(logits.shape[-1] - 1)
