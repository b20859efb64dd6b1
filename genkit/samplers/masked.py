"""Parallel decoding of masked ids by confidence (Chang et al., "MaskGIT", CVPR 2022, section 3.2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import OnStep, PredictIds
from genkit.rng import Rng


class Masked:
    """Fills the unknown positions of ids [B, Q, *grid] in num_steps calls of the model.

    Each step draws every unknown id, keeps the most confident positions and masks the others again, the fraction
    gamma((step + 1) / num_steps) of those that were unknown at the start. Confidence is the log-probability of what was
    drawn, its mean over the Q levels, plus Gumbel noise whose strength falls linearly to 0; without that noise samples
    lose their variety. A sample with fewer unknown positions than steps is complete early.

    Args:
        num_steps: calls of the model, >= 1.
        temperature: strength of the Gumbel noise at the start.
        softmax_temperature: divides the logits of the draw, > 0.
        schedule: gamma as in training: "cosine", "linear" or "arccos".
    """

    def __init__(
        self,
        *,
        num_steps: int = 12,
        temperature: float = 4.5,
        softmax_temperature: float = 1.0,
        schedule: Literal["cosine", "linear", "arccos"] = "cosine",
    ):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        if temperature < 0:
            raise UsageError(f"sampler.temperature={temperature} must not be negative")
        if softmax_temperature <= 0:
            raise UsageError(f"sampler.softmax_temperature={softmax_temperature} must be positive")
        self.num_steps, self.schedule = num_steps, schedule
        self.temperature, self.softmax_temperature = temperature, softmax_temperature

    def __call__(self, predict: PredictIds, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """ids [B, Q, *grid] without a hole.

        Args:
            predict: (ids, known, cache) -> logits [B, Q, *grid, S].
            start: int64, -1 where an id is to be found; every other id is kept (inpainting).
            rng: one stream per sample.
            on_step: is shown the ids with -1 where they are still unknown.
        """
        B, _, *grid = start.shape
        draws, noise = rng.fork("draw"), rng.fork("confidence")
        ids, given = start, start >= 0  # [B, Q, *grid]
        unknown = ~given.flatten(2).all(1)  # [B, N]: a position is open while any of its levels is
        remaining = self.counts(unknown.sum(1))  # [num_steps, B]
        known = given
        for step in range(self.num_steps):
            logits = predict(ids, known, None) / self.softmax_temperature
            if step == 0 and int(start.max()) >= logits.shape[-1]:
                found = f"the start holds id {int(start.max())} of a codebook of {logits.shape[-1]}"
                raise UsageError(f"{found}; where an id is to be found, put -1")
            drawn = torch.where(known, ids, draws.categorical(logits))
            if step + 1 == self.num_steps:
                ids, known = drawn, torch.ones_like(known)
            else:
                log_p = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)  # [B, Q, *grid]
                strength = self.temperature * (1 - (step + 1) / self.num_steps)
                gumbel = noise.gumbel(math.prod(grid)).to(log_p.device)
                confidence = (log_p.flatten(2).mean(1) + strength * gumbel).masked_fill(~unknown, math.inf)  # [B, N]
                rank = confidence.argsort(dim=1, stable=True).argsort(dim=1)  # 0 = least confident
                unknown = rank < remaining[step].unsqueeze(1)
                known = given | ~unknown.view(B, 1, *grid)
                ids = torch.where(known, drawn, -1)
            if on_step is not None:
                on_step(step, self.num_steps, ids)
        return ids

    def counts(self, num_unknown: Tensor) -> Tensor:
        """Positions of each sample still masked after each step, [num_steps, B], from the numbers [B] at the start.

        At least one position is filled per step and one is left for the next step, while there are that many.
        """
        left, table = num_unknown, []
        for step in range(self.num_steps - 1):
            wanted = (num_unknown * gamma((step + 1) / self.num_steps, self.schedule)).floor().long()
            left = torch.minimum(wanted.clamp_min(1), left - 1).clamp_min(0)
            table.append(left)
        return torch.stack([*table, torch.zeros_like(num_unknown)])


def gamma(r: float, schedule: str) -> float:
    """Masked fraction for r in [0, 1], falling from 1 to 0."""
    if schedule == "cosine":
        return math.cos(r * math.pi / 2)
    if schedule == "arccos":
        return math.acos(r) * 2 / math.pi
    return 1 - r
