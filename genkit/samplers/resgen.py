"""Residual ids filled in by confidence over places and depths (Kim et al., "ResGen", ICML 2025)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, OnStep, PredictMixture
from genkit.rng import Rng
from genkit.samplers.unmasking import check_schedule, check_steps, counts


class ResGen:
    """Fills the unknown ids of [B, Q, *grid] in num_steps calls of the model, however many levels there are.

    Each step draws a vector for every place that has unknown levels, and the ids nearest to it. The fraction gamma((step + 1) / num_steps) of the ids that
    were unknown at the start is then masked again: of all new ids the least confident are counted per place, and so many of its deepest levels are masked.

    Args:
        num_steps: calls of the model, >= 1 and at most the number of ids.
        schedule: gamma, see genkit.samplers.unmasking.
        top_p: of the components of the mixture, only the likeliest with together this weight are drawn from.
        temperature: multiplies the deviation of what is drawn around a mean.
        confidence: of a place, "tokens" the mean log-probability of its new ids, given how far off the vector may be; "density" log p of the vector;
            "component" of its component; "random": any id may be masked again, as in training.
        noise: strength of the Gumbel noise on the confidence at the start; it falls linearly to 0.
    """

    def __init__(
        self,
        *,
        num_steps: int = 16,
        schedule: str = "cosine",
        top_p: float = 0.95,
        temperature: float = 1.0,
        confidence: Literal["tokens", "density", "component", "random"] = "tokens",
        noise: float = 4.5,
    ):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        if not 0 < top_p <= 1:
            raise UsageError(f"sampler.top_p={top_p} must be in (0, 1]")
        if temperature < 0 or noise < 0:
            raise UsageError(f"sampler.temperature={temperature} and sampler.noise={noise} must not be negative")
        check_schedule(schedule, "sampler.schedule")
        self.num_steps, self.schedule, self.top_p = num_steps, schedule, top_p
        self.temperature, self.confidence, self.noise = temperature, confidence, noise

    def __call__(self, predict: PredictMixture, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """ids [B, Q, *grid] without a hole.

        Args:
            predict: (ids, known, cache) -> Mixture of every place; see genkit.objectives.resgen.
            start: int64, -1 where an id is to be found. Behind an unknown level all deeper ones are unknown too: they are found anew.
            rng: one stream per sample.
            on_step: is shown the ids with -1 where they are still unknown.
        """
        B, Q, *grid = start.shape
        N = math.prod(grid)
        check_steps(self.num_steps, N * Q)
        draws, fresh, gumbel = rng.fork("draw"), rng.fork("vector"), rng.fork("confidence")
        ids = start.flatten(2)  # [B, Q, N]
        num_masked = Q - (ids >= 0).cumprod(1).sum(1)  # [B, N]
        remaining = counts(num_masked.sum(1), self.num_steps, self.schedule)  # [num_steps, B]
        for step in range(self.num_steps):
            cache: Cache = {"steps": (step, self.num_steps)}
            known = ~deepest(num_masked, Q)
            mixture = predict(ids.view_as(start), known.view_as(start), cache)
            codes = mixture.codes
            noise = fresh.normal(N, codes.tables.shape[-1]).to(mixture.shift)
            z, component = mixture.draw(draws.uniform(N).to(mixture.shift), noise, self.top_p, self.temperature)
            scale = codes.std[num_masked]  # [B, N]
            is_last = step + 1 == self.num_steps
            sigma = mixture.log_sigma.exp() * scale if self.confidence == "tokens" and not is_last else None
            drawn, sure = codes.quantise(z * scale.unsqueeze(-1), ids, num_masked, sigma)
            if not is_last:
                place = self.confidence_of(mixture, z, component, sure, num_masked)  # [B, N]
                strength = 1.0 if self.confidence == "random" else self.noise * (1 - (step + 1) / self.num_steps)
                score = place.unsqueeze(1) + strength * gumbel.gumbel(Q, N).to(place)  # [B, Q, N]
                score = score.masked_fill(known, math.inf)
                rank = score.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
                num_masked = (rank < remaining[step].unsqueeze(1)).view(B, Q, N).sum(1)
            else:
                num_masked = torch.zeros_like(num_masked)
            ids = torch.where(deepest(num_masked, Q), -1, drawn)
            if on_step is not None:
                on_step(step, self.num_steps, ids.view_as(start))
        return ids.view_as(start)

    def confidence_of(
        self, mixture: Any, z: Tensor, component: Tensor, sure: Tensor | None, num_masked: Tensor
    ) -> Tensor:
        """[B, N], comparable between places with few and with many unknown levels."""
        if sure is not None:
            return sure.sum(1) / num_masked.clamp_min(1)
        if self.confidence == "density":
            return mixture.log_prob(z) / z.shape[-1]
        if self.confidence == "component":
            return mixture.logits.log_softmax(-1).gather(-1, component.unsqueeze(-1)).squeeze(-1)
        return torch.zeros_like(mixture.log_sigma)


def deepest(num_masked: Tensor, num_levels: int) -> Tensor:
    """num_masked [B, N] -> [B, Q, N] bool, True at that many of the deepest levels."""
    return torch.arange(num_levels, device=num_masked.device)[:, None] >= num_levels - num_masked.unsqueeze(1)
