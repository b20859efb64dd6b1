"""Classifier-free guidance (Ho and Salimans, 2022) as a wrapper around what a sampler calls.

out = weak + strength (cond - weak), where weak is the same model with label -1, one forward pass with the batch doubled; or a worse model with the same
condition (autoguidance: Karras et al., 2024). Strength 1 is no guidance, 0 the weak model.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout, Predict, PredictIds, PredictNext, PredictTokens
from genkit.nn.context import context_of
from genkit.nn.paths import Predictor
from genkit.nn.token_head import TokenPredictor

Schedule = Literal["constant", "linear", "cosine"]
CONTEXTS = ("context", "text", "picture")  # conditions of which all zeros mean nothing


@dataclass(frozen=True)
class Guidance:
    """How strongly, when and what is guided.

    Args:
        strength: >= 0; 1 gives the plain predictor, without the second half of the batch.
        schedule: "constant"; "linear": from 1 to strength with the fraction of a sample's ids that are known (as MUSE, 2023, and MAR, 2024), of latents
            with 1 - t; "cosine": the same along (1 - cos(pi f)) / 2. What is drawn from almost nothing keeps its variety.
        interval: latents are guided only while t is in it (Kynkaanniemi et al., 2024); outside, the second half is not computed. Ids that are drawn in
            sequence: the same, t falling from 1 at the first step to 0 at the last (as LlamaGen's interval).
        channels: of latents, only the first so many are guided; None = all.
        power: of the fraction f in "linear" and "cosine", f^power (as MDT, 2023, and TiTok's larger generators).
        over: of masked generators, what f is: the fraction "known", or of the "steps" that are done (as TiTok's generators).
    """

    strength: float = 1.0
    schedule: Schedule = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    power: float = 1.0
    over: Literal["known", "steps"] = "known"

    def at(self, fraction: Tensor) -> Tensor:
        """The strength when this fraction [...] in [0, 1] is known."""
        if self.schedule == "constant":
            return torch.full_like(fraction, self.strength)
        fraction = fraction**self.power
        grown = fraction if self.schedule == "linear" else (1 - torch.cos(math.pi * fraction)) / 2
        return 1 + (self.strength - 1) * grown


def guide(
    objective: Any, model: Any, cond: Cond, layout: Layout, guidance: Guidance, weak: Any = None
) -> Predict | PredictIds | PredictNext | PredictTokens:
    """What the sampler of this objective may call, guided.

    Args:
        weak: a worse model of the same kind for autoguidance; None = the model itself without labels.
    """
    if guidance.strength == 1 or (not cond.keys() & {"label", *CONTEXTS} and weak is None):
        return objective.predictor(model, cond, layout)
    if hasattr(objective, "guided"):
        return objective.guided(model, cond, guidance, weak)
    wraps: dict[str, Any] = {"z": guide_latents, "ids": guide_ids, "next": GuidedNext, "tokens": guide_tokens}
    return wraps[getattr(objective, "draws", objective.target)](objective, model, cond, layout, guidance, weak)


def guide_ids(
    objective: Any, model: Any, cond: Cond, layout: Layout, guidance: Guidance, weak: Any = None
) -> PredictIds:
    """(ids [B, Q, *grid], known, cache) -> guided logits [B, Q, *grid, S]. A cache holds both halves of the doubled
    batch."""
    if weak is not None:
        strong, poor = objective.predictor(model, cond, layout), objective.predictor(weak, cond, layout)
    else:
        predict_both: Any = objective.predictor(model, _and_null(cond), _twice(layout))

    # What predictors of ids return may be more than a tensor of logits: see objectives/resgen.py.
    lerp: Any = getattr(objective, "lerp", torch.lerp)

    def predict(ids: Tensor, known: Tensor, cache: Cache | None = None) -> Tensor:
        if weak is not None:
            logits, null = strong(ids, known, cache), poor(ids, known, _twin(cache))
        else:
            both = predict_both(torch.cat([ids, ids]), torch.cat([known, known]), cache)
            logits, null = both.chunk(2)
        if guidance.schedule == "constant":
            return lerp(null, logits, guidance.strength)
        weight = guidance.at(_done(guidance, cache, known))  # [B]
        return lerp(null, logits, weight.float().view(-1, *[1] * (logits.ndim - 1)))

    return predict


def _done(guidance: Guidance, cache: Cache | None, known: Tensor) -> Tensor:
    """[B], how much of each sample is known, or of the steps done: what a sampler says in the cache, else what can be seen."""
    if guidance.over == "steps":
        if cache is None or "steps" not in cache:
            raise UsageError("sampler.guidance_over=steps: this sampler does not count its steps; use known")
        step, num_steps = cache["steps"]
        return torch.full((len(known),), step / num_steps, device=known.device)
    if cache is not None and "known" in cache:
        return cache["known"]
    return known.flatten(1).float().mean(1)


def _twin(cache: Cache | None) -> Cache | None:
    """The cache of another network that is asked about the same tokens."""
    context = context_of(cache)
    return None if cache is None or context is None else {**cache, "context": context.twin()}


def guide_tokens(
    objective: Any, model: Any, cond: Cond, layout: Layout, guidance: Guidance, weak: Any = None
) -> PredictTokens:
    """(tokens [B, N, W], known, cache) -> what draws them, guided: each token's noise by that of the same token without a label. Variances are those under
    the condition."""
    if guidance.channels is not None:
        raise UsageError("sampler.guidance_channels: tokens are guided as a whole; remove it")
    if weak is not None:
        strong, poor = objective.predictor(model, cond, layout), objective.predictor(weak, cond, layout)
    else:
        both: Any = objective.predictor(model, _and_null(cond), _twice(layout))

    def predict(tokens: Tensor, known: Tensor, cache: Cache | None = None) -> Any:
        if weak is not None:
            heads = strong(tokens, known, cache), poor(tokens, known, _twin(cache))
        else:
            head = both(torch.cat([tokens, tokens]), torch.cat([known, known]), cache)

        def at(slots: Tensor, fraction: Tensor) -> Predict:
            if guidance.over == "steps":
                fraction = _done(guidance, cache, known)
            own = [h(slots, fraction) for h in heads] if weak is not None else [head(slots.repeat(2, 1), fraction)]

            def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
                if weak is not None:
                    full, null = (one(x_t, t) for one in own)
                else:
                    halves = [part.chunk(2) for part in own[0](torch.cat([x_t, x_t]), t)]
                    full, null = tuple(half[0] for half in halves), tuple(half[1] for half in halves)
                low, high = guidance.interval
                weight = guidance.at(fraction) if low <= float(t) <= high else torch.ones_like(fraction)
                weight = weight.to(x_t.dtype).view(-1, 1, 1)
                return (*(torch.lerp(n, f, weight) for n, f in zip(null[:2], full[:2], strict=True)), *full[2:])

            return Predictor(own[0].path, denoise)

        return at

    plain = strong if weak is not None else both
    return TokenPredictor(predict, plain.split, plain.join)


class GuidedNext:
    """PredictNext whose logits are guided, both halves in one batch; see genkit.interfaces.PredictNext.

    A schedule grows with the number of the step, from 0 at the first to 1 at the last (as VAR, 2024). Where it or the interval of
    genkit.guidance.Guidance makes the strength 1, both halves are computed all the same: a cache has to go on with both.
    """

    def __init__(
        self, objective: Any, model: Any, cond: Cond, layout: Layout, guidance: Guidance, weak: Any = None
    ) -> None:
        if weak is not None:
            self.strong, self.poor = (objective.predictor(network, cond, layout) for network in (model, weak))
        else:
            self.strong = objective.predictor(model, _and_null(cond), _twice(layout))
            self.poor = None
        self.guidance = guidance
        self.counts, self.shape, self.codebook_size = (
            getattr(self.strong, name) for name in ("counts", "shape", "codebook_size")
        )
        self.to_sequence, self.to_ids, self.is_over = self.strong.to_sequence, self.strong.to_ids, self.strong.is_over
        total = itertools.accumulate(self.counts, initial=0)
        self.step_at = {done: step for step, done in enumerate(total)}  # by the number of ids so far

    def __call__(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        step = self.step_at[ids.shape[1]]
        return self._guided(lambda predict, ids, cache: predict(ids, cache), ids, cache, step)

    @property
    def several(self) -> Callable[[Tensor, Cache | None, int], Tensor]:
        """As of the predictor, for parallel decoding: (ids, cache, count) -> logits [B, count, S]; there where the predictor has it."""
        if not hasattr(self.strong, "several"):
            raise AttributeError("the predictor that is guided draws no ids in parallel")
        return self._several

    def _several(self, ids: Tensor, cache: Cache | None, count: int) -> Tensor:
        first = self.step_at[ids.shape[1] - count + 1]
        return self._guided(
            lambda predict, ids, cache: predict.several(ids, cache, count),
            ids,
            cache,
            list(range(first, first + count)),
        )

    def repeated(self, times: int) -> GuidedNext:
        """See genkit.interfaces.PredictNext."""
        other = copy.copy(self)
        other.strong = self.strong.repeated(times)
        other.poor = None if self.poor is None else self.poor.repeated(times)
        return other

    def _guided(self, call: Any, ids: Tensor, cache: Cache | None, step: Any) -> Tensor:
        if self.poor is not None:
            caches = (None, None) if cache is None else tuple(cache.setdefault(k, {}) for k in ("strong", "poor"))
            logits, null = call(self.strong, ids, caches[0]), call(self.poor, ids, caches[1])
        else:
            logits, null = call(self.strong, torch.cat([ids, ids]), cache).chunk(2)
        fraction = torch.as_tensor(step, dtype=logits.dtype, device=logits.device) / max(1, len(self.counts) - 1)
        low, high = self.guidance.interval
        is_guided = (1 - fraction >= low) & (1 - fraction <= high)
        weight = torch.where(is_guided, self.guidance.at(fraction), 1.0).unsqueeze(
            -1
        )  # [] or [count], and an axis for S
        # Ids that are ruled out for both stay so: the difference of two infinities is no number.
        return torch.lerp(null, logits, weight).masked_fill(logits.isneginf() & null.isneginf(), -torch.inf)


def guide_latents(
    objective: Any, model: Any, cond: Cond, layout: Layout, guidance: Guidance, weak: Any = None
) -> Predict:
    """(x_t [B, C, *grid], t) -> guided (x0, noise). Both are linear in the network's output, so each is guided the
    same way. Variances of the network are those under the condition."""
    plain: Any = objective.predictor(model, cond, layout)
    other: Any = objective.predictor(weak, cond, layout) if weak is not None else None
    predict_both: Any = objective.predictor(model, _and_null(cond), _twice(layout)) if weak is None else None
    low, high = guidance.interval

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        is_guided = (t >= low) & (t <= high)
        if not bool(is_guided.any()):
            return plain(x_t, t)
        if weak is not None:
            strong, poor = plain(x_t, t), other(x_t, t)
        else:
            times = torch.cat([t, t]) if t.ndim else t
            halves = [both.chunk(2) for both in predict_both(torch.cat([x_t, x_t]), times)]
            strong, poor = tuple(half[0] for half in halves), tuple(half[1] for half in halves)
        strength = torch.where(is_guided, guidance.at(1 - t), 1.0)
        weight = strength.to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1)) if t.ndim else float(strength)
        return (
            *(_lerp(p, s, weight, guidance.channels) for p, s in zip(poor[:2], strong[:2], strict=True)),
            *strong[2:],
        )

    return Predictor(plain.path, predict)


def _lerp(poor: Tensor, strong: Tensor, weight: Tensor | float, channels: int | None) -> Tensor:
    guided = torch.lerp(poor, strong, weight)
    return guided if channels is None else torch.cat([guided[:, :channels], strong[:, channels:]], dim=1)


def _and_null(cond: Cond) -> Cond:
    """The condition for a doubled batch: its second half without labels, contexts and texts, everything else repeated."""
    nothing = {"label": -1, **dict.fromkeys(CONTEXTS, 0)}
    return {
        name: torch.cat([value, torch.full_like(value, nothing[name]) if name in nothing else value])
        for name, value in cond.items()
    }


def _twice(layout: Layout) -> Layout:
    """The layout of a doubled batch; coordinates shared by the batch stay shared."""
    coords, valid = layout.coords, layout.valid
    if coords.shape[0] > 1:
        coords = torch.cat([coords, coords])
    return replace(layout, coords=coords, valid=None if valid is None else torch.cat([valid, valid]))
