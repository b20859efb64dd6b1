"""Continuous tokens in random order, many at a time, each drawn by its own small diffusion (Li et al., "MAR", NeurIPS 2024, section 3.3)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, OnStep, Predict, PredictTokens
from genkit.rng import Rng
from genkit.samplers.ancestral import Ancestral
from genkit.samplers.dpmpp import Dpmpp
from genkit.samplers.euler import Euler
from genkit.samplers.unmasking import check_schedule, check_steps, counts


class MAR:
    """Fills latents [B, C, *grid] in num_steps calls of the model.

    A random order of the tokens decides who comes first; after each step the fraction gamma((step + 1) / num_steps) of those unknown at the start is still
    unknown. With reuse the steps come in groups (genkit/reuse/recap.py): a group fills the tokens that are next in that order.

    Args:
        num_steps: calls of the model, >= 1 and at most the number of tokens.
        schedule: gamma, see genkit.samplers.unmasking.
        head: how a token is drawn: "ancestral" the paper's DDPM with learned variances; "euler" (DDIM) and "dpmpp" without noise.
        head_steps: steps of that.
        temperature: multiplies the noise of the ancestral steps, not the one they start from.
        reuse: kinds that group steps: recap.
    """

    def __init__(
        self,
        *,
        num_steps: int = 64,
        schedule: str = "cosine",
        head: Literal["ancestral", "euler", "dpmpp"] = "ancestral",
        head_steps: int = 100,
        temperature: float = 1.0,
        reuse: Any = None,
    ):
        for name, value in (("num_steps", num_steps), ("head_steps", head_steps)):
            if value < 1:
                raise UsageError(f"sampler.{name}={value} must be at least 1")
        if temperature < 0:
            raise UsageError(f"sampler.temperature={temperature} must not be negative")
        check_schedule(schedule, "sampler.schedule")
        if reuse is not None:
            reuse.check_needs_no_choice("mar")
        self.num_steps, self.schedule, self.reuse = num_steps, schedule, reuse
        self.head, self.head_steps, self.temperature = head, head_steps, temperature

    def __call__(self, predict: PredictTokens, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """z [B, C, *grid] without a hole.

        Args:
            predict: (tokens, known, cache) -> what draws tokens.
            start: NaN where a latent is to be found; every other one is kept. A token of which a part is unknown is drawn as a whole, and then keeps the rest.
            rng: one stream per sample.
            on_step: is shown the latents, 0 where they are still unknown.
        """
        tokens = predict.split(start)  # [B, N, W]
        known = ~tokens.isnan().any(-1)  # [B, N]
        N, W = tokens.shape[1:]
        check_steps(self.num_steps, N)
        tokens = tokens.nan_to_num(0)
        order = (rng.fork("order").order(N) + N * known).argsort(dim=1)  # unknown ones first, in random order
        num_unknown = (~known).sum(1)
        filled = num_unknown - counts(num_unknown, self.num_steps, self.schedule)  # [num_steps, B]: after each step
        done, step = torch.zeros_like(num_unknown), 0
        for size in [1] * self.num_steps if self.reuse is None else self.reuse.groups(self.num_steps):
            cache: Cache = {} if size == 1 else self.reuse.cache()
            first, (group, is_member) = done, span(order, done, filled[step + size - 1])
            for light in range(size):
                cache["steps"] = step, self.num_steps
                places, is_new = span(order, done, filled[step])  # [B, n]
                if light:
                    cache["context"].chosen = group
                    cache["context"].used = None if bool(is_member.all()) else is_member
                    rows = group.unsqueeze(-1).expand(-1, -1, W)
                    at = predict(tokens.gather(1, rows), known.gather(1, group), cache)
                    asked = ((done - first)[:, None] + torch.arange(places.shape[1], device=places.device)).clamp_max(
                        group.shape[1] - 1
                    )
                else:
                    at, asked = predict(tokens, known, cache), places
                if places.shape[1]:
                    fraction = 1 - (num_unknown - filled[step]) / N  # of what is known after this step
                    drawn = self.draw(at(asked, fraction), places.shape[1], W, rng.fork(f"token {step}"), light > 0)
                    rows = places.unsqueeze(-1).expand(-1, -1, W)
                    drawn = torch.where(is_new.unsqueeze(-1), drawn.to(tokens), tokens.gather(1, rows))
                    tokens = tokens.scatter(1, rows, drawn)
                    known = known.scatter(1, places, is_new | known.gather(1, places))
                done = filled[step]
                if on_step is not None:
                    on_step(step, self.num_steps, predict.join(tokens))
                step += 1
        return torch.where(start.isnan(), predict.join(tokens), start)

    def draw(self, denoise: Predict, count: int, width: int, rng: Rng, is_light: bool) -> Tensor:
        """Tokens [B, count, width]."""
        num_steps = self.head_steps
        if is_light and self.reuse.head_steps is not None:
            num_steps = self.reuse.head_steps
        sampler: Any = {
            "ancestral": lambda: Ancestral(num_steps=num_steps, variance="learned"),
            "euler": lambda: Euler(num_steps=num_steps),
            "dpmpp": lambda: Dpmpp(num_steps=num_steps),
        }[self.head]()
        noise = TokenNoise(rng.fork("start")).normal(count, width)
        return sampler(denoise, noise, TokenNoise(rng, self.temperature))


class TokenNoise:
    """Streams whose normal numbers [B, n, W] begin alike whatever n is: those of a sample do not depend on how many tokens another one has to draw."""

    def __init__(self, rng: Rng, strength: float = 1.0):
        self.rng, self.strength = rng, strength

    def fork(self, word: str) -> TokenNoise:
        return TokenNoise(self.rng.fork(word), self.strength)

    def normal(self, *shape: int) -> Tensor:
        u, v = self.rng.uniform(*shape, 2).unbind(-1)
        return self.strength * (-2 * torch.log1p(-u)).sqrt() * (2 * math.pi * v).cos()


def span(order: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(order[low .. high - 1] of every sample, [B, n]; False where it is only there because another sample has more, [B, n]). All are distinct."""
    slots = low[:, None] + torch.arange(int((high - low).max()), device=order.device)
    return order.gather(1, slots % order.shape[1]), slots < high[:, None]
