"""Parallel decoding of masked ids by confidence (Chang et al., "MaskGIT", CVPR 2022, section 3.2)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, OnStep, PredictIds
from genkit.rng import Rng, pick
from genkit.samplers.unmasking import annealed, check_schedule, check_steps, counts


class Masked:
    """Fills the unknown positions of ids [B, Q, *grid] in num_steps calls of the model.

    Each step draws every unknown id, keeps the most confident positions and masks the others again, the fraction
    gamma((step + 1) / num_steps) of those that were unknown at the start. Confidence is the log-probability of what was
    drawn, its mean over the Q levels, plus Gumbel noise whose strength falls linearly to 0; without that noise samples
    lose their variety. A sample with fewer unknown positions than steps is complete early.

    With reuse the steps come in groups (genkit/reuse/recap.py). The first step of a group decides which positions the whole group fills, those it is most
    confident of, and fills the surest; the others follow in that order, each light step drawing them anew with what the group has filled so far. Or light
    steps fill what they are most confident of, among the positions of the group.

    Args:
        num_steps: calls of the model, >= 1 and at most the number of positions.
        temperature: strength of the Gumbel noise at the start.
        softmax_temperature: divides the logits of the draw; 0 = the likeliest.
        softmax_end, softmax_power: it falls to softmax_end at the last step, along 1 - (step / (num_steps - 1))^softmax_power. None = it stays.
        schedule: gamma, see genkit.samplers.unmasking.
        confidence: "log_prob"; or "logit" of what was drawn, as TiTok's generators and MaskGen.
        reuse: kinds that group steps: recap.
    """

    def __init__(
        self,
        *,
        num_steps: int = 12,
        temperature: float = 4.5,
        softmax_temperature: float = 1.0,
        softmax_end: float | None = None,
        softmax_power: float = 1.0,
        schedule: str = "cosine",
        confidence: Literal["log_prob", "logit"] = "log_prob",
        reuse: Any = None,
    ):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        if temperature < 0:
            raise UsageError(f"sampler.temperature={temperature} must not be negative")
        if softmax_temperature < 0 or (softmax_end or 0.0) < 0:
            raise UsageError(
                f"sampler.softmax_temperature={softmax_temperature} and sampler.softmax_end={softmax_end} must not be negative"
            )
        if softmax_power <= 0:
            raise UsageError(f"sampler.softmax_power={softmax_power} must be positive")
        check_schedule(schedule, "sampler.schedule")
        self.num_steps, self.schedule, self.confidence, self.reuse = num_steps, schedule, confidence, reuse
        self.temperature, self.softmax_temperature = temperature, softmax_temperature
        self.softmax_end, self.softmax_power = softmax_end, softmax_power

    def __call__(self, predict: PredictIds, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """ids [B, Q, *grid] without a hole.

        Args:
            predict: (ids, known, cache) -> logits [B, Q, *grid, S]. The cache says under "steps" (step, number of steps).
            start: int64, -1 where an id is to be found; every other id is kept (inpainting).
            rng: one stream per sample.
            on_step: is shown the ids with -1 where they are still unknown.
        """
        B, _, *grid = start.shape
        N = math.prod(grid)
        check_steps(self.num_steps, N)
        draws, noise = rng.fork("draw"), rng.fork("confidence")
        ids, given = start, start >= 0  # [B, Q, *grid]
        unknown = ~given.flatten(2).all(1)  # [B, N]: a position is open while any of its levels is
        remaining = self.counts(unknown.sum(1))  # [num_steps, B]
        known, step = given, 0
        chooses_anew = self.reuse is not None and self.reuse.choice == "anew"
        for size in [1] * self.num_steps if self.reuse is None else self.reuse.groups(self.num_steps):
            cache: Cache = {} if size == 1 else self.reuse.cache()
            cache["steps"] = step, self.num_steps
            logits = predict(ids, known, cache)
            if step == 0 and int(start.max()) >= logits.shape[-1]:
                found = f"the start holds id {int(start.max())} of a codebook of {logits.shape[-1]}"
                raise UsageError(f"{found}; where an id is to be found, put -1")
            drawn = torch.where(known, ids, draws.categorical(logits, self.softmax_at(step)))
            if step + 1 == self.num_steps:
                ids, known = drawn, torch.ones_like(known)
            else:
                # Of a group, as at its end: what is chosen with more noise is not chosen anew (ReCAP counts groups alike).
                end = step + (1 if chooses_anew else size)
                confidence = self.confidences(logits, drawn, noise.gumbel(N), end)  # [B, N]
                order = confidence.masked_fill(~unknown, math.inf).argsort(
                    dim=1, stable=True
                )  # the least confident first, known ones last
                num_unknown = unknown.sum(1)
                unknown = order.argsort(dim=1) < remaining[step].unsqueeze(1)
                known = given | ~unknown.view(B, 1, *grid)
                ids = torch.where(known, drawn, -1)
            if on_step is not None:
                on_step(step, self.num_steps, ids)
            step += 1
            if size > 1:
                assert self.reuse is not None
                group = Group(order, num_unknown, remaining[step - 1 : step - 1 + size], step - 1, self.reuse.spare)
                for _ in range(size - 1):
                    ids, known = self.light_step(predict, ids, known, given, group, cache, draws, noise, step)
                    if on_step is not None:
                        on_step(step, self.num_steps, ids)
                    step += 1
                unknown = ~known.flatten(2).all(1)
        return ids

    def softmax_at(self, step: int) -> float:
        """What divides the logits at this step."""
        return annealed(self.softmax_temperature, self.softmax_end, self.softmax_power, step, self.num_steps)

    def confidences(self, logits: Tensor, drawn: Tensor, gumbel: Tensor, end: int) -> Tensor:
        """[B, n]: how sure the model is of the ids drawn [B, Q, *n] from logits [B, Q, *n, S], and noise [B, n] that is gone when the step `end` is the last."""
        sure = logits.gather(-1, drawn.clamp_min(0).unsqueeze(-1)).squeeze(-1)  # [B, Q, *n]
        if self.confidence == "log_prob":
            sure = sure - logits.logsumexp(-1)
        return sure.flatten(2).mean(1) + self.temperature * (1 - end / self.num_steps) * gumbel.to(sure.device)

    def light_step(
        self,
        predict: PredictIds,
        ids: Tensor,
        known: Tensor,
        given: Tensor,
        group: Group,
        cache: Cache,
        draws: Rng,
        noise: Rng,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """(ids, known) after the model has seen the tokens of the group alone."""
        B, Q, *grid = ids.shape
        context = cache["context"]
        context.chosen, context.used = group.chosen, group.used
        cache["steps"] = step, self.num_steps
        cache["known"] = known.flatten(1).float().mean(1)  # of all tokens, not of those that are shown
        place = group.chosen.unsqueeze(1).expand(B, Q, -1)  # [B, Q, n]
        own, own_known = ids.flatten(2).gather(2, place), known.flatten(2).gather(2, place)
        logits = predict(own, own_known, cache)  # [B, Q, n, S]
        # A number for every place of the grid, so that what a place is given does not depend on how many are asked.
        u = draws.uniform(Q, math.prod(grid)).to(logits.device).gather(2, place)
        drawn = torch.where(own_known, own, pick(logits, u, self.softmax_at(step)))
        is_filled = group.filled(step)  # [B, n]
        if self.reuse.choice == "anew" and step + 1 < self.num_steps:
            gumbel = noise.gumbel(math.prod(grid)).to(logits.device).gather(1, group.chosen)
            confidence = self.confidences(logits, drawn, gumbel, step + 1)
            confidence = confidence.masked_fill(own_known.all(1), math.inf)
            if group.used is not None:
                confidence = confidence.masked_fill(~group.used, -math.inf)
            # The surest first; there are as many of them as the order of the full step would have filled.
            is_filled = is_filled.gather(1, confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1))
        own_known = own_known | is_filled.unsqueeze(1)
        own = torch.where(own_known, drawn, -1)
        ids = ids.flatten(2).scatter(2, place, own).view_as(ids)
        known = known.flatten(2).scatter(2, place, own_known).view_as(known)
        return ids, known | given

    def counts(self, num_unknown: Tensor) -> Tensor:
        """Positions of each sample still masked after each step, [num_steps, B], from the numbers [B] at the start."""
        return counts(num_unknown, self.num_steps, self.schedule)


class Group:
    """The positions that the steps of a group fill, in their order, and some that are spare.

    Args:
        order: [B, N] int64, positions, the last of the num_unknown [B] first ones is filled first.
        remaining: [steps of the group, B], positions still unknown after each.
        first: number of the group's first step.
        spare: as a part of those that are filled, how many more are computed.

    Attributes:
        chosen: [B, n] int64, positions.
        used: [B, n] bool, False where a sample has fewer of them than another; None = all.
    """

    def __init__(self, order: Tensor, num_unknown: Tensor, remaining: Tensor, first: int, spare: float = 0.0):
        self._filled, self._first = num_unknown - remaining, first  # [steps, B]
        size = torch.minimum((self._filled[-1] * (1 + spare)).ceil().long(), num_unknown)  # [B]
        n = int(size.max())
        self._slots = torch.arange(n, device=order.device)
        # Distinct positions, unused slots too: they go on from the last known one.
        self.chosen = order.gather(1, (num_unknown[:, None] - 1 - self._slots) % order.shape[1])
        used = self._slots < size[:, None]
        self.used = None if bool(used.all()) else used

    def filled(self, step: int) -> Tensor:
        """[B, n] bool: the slots that are known after this step, in the order of the group."""
        return self._slots < self._filled[step - self._first][:, None]
