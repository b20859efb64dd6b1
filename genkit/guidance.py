"""Classifier-free guidance (Ho and Salimans, 2022) as a wrapper around what a sampler calls.

out = weak + strength (cond - weak), where weak is the same model with label -1, one forward pass with the batch doubled; or a worse model with the same
condition (autoguidance: Karras et al., 2024). Strength 1 is no guidance, 0 the weak model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.interfaces import Cache, Cond, Layout, Predict, PredictIds
from genkit.nn.paths import Predictor

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Guidance:
    """How strongly, when and what is guided.

    Args:
        strength: >= 0; 1 gives the plain predictor, without the second half of the batch.
        schedule: "constant"; "linear": from 1 to strength with the fraction of a sample's ids that are known (as MUSE, 2023, and MAR, 2024), of latents
            with 1 - t; "cosine": the same along (1 - cos(pi f)) / 2. What is drawn from almost nothing keeps its variety.
        interval: latents are guided only while t is in it (Kynkaanniemi et al., 2024); outside, the second half is not computed.
        channels: of latents, only the first so many are guided; None = all.
    """

    strength: float = 1.0
    schedule: Schedule = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None

    def at(self, fraction: Tensor) -> Tensor:
        """The strength when this fraction [...] in [0, 1] is known."""
        if self.schedule == "constant":
            return torch.full_like(fraction, self.strength)
        grown = fraction if self.schedule == "linear" else (1 - torch.cos(math.pi * fraction)) / 2
        return 1 + (self.strength - 1) * grown


def guide(
    objective: Any, model: Any, cond: Cond, layout: Layout, guidance: Guidance, weak: Any = None
) -> Predict | PredictIds:
    """What the sampler of this objective may call, guided.

    Args:
        weak: a worse model of the same kind for autoguidance; None = the model itself without labels.
    """
    if guidance.strength == 1 or ("label" not in cond and weak is None):
        return objective.predictor(model, cond, layout)
    wrap = guide_ids if objective.target == "ids" else guide_latents
    return wrap(objective, model, cond, layout, guidance, weak)


def guide_ids(
    objective: Any, model: Any, cond: Cond, layout: Layout, guidance: Guidance, weak: Any = None
) -> PredictIds:
    """(ids [B, Q, *grid], known, cache) -> guided logits [B, Q, *grid, S]. A cache holds both halves of the doubled
    batch."""
    if weak is not None:
        strong, poor = objective.predictor(model, cond, layout), objective.predictor(weak, cond, layout)
    else:
        predict_both: Any = objective.predictor(model, _and_null(cond), _twice(layout))

    def predict(ids: Tensor, known: Tensor, cache: Cache | None = None) -> Tensor:
        if weak is not None:
            logits, null = strong(ids, known, cache), poor(ids, known, None)
        else:
            both = predict_both(torch.cat([ids, ids]), torch.cat([known, known]), cache)
            logits, null = both.chunk(2)
        if guidance.schedule == "constant":
            return torch.lerp(null, logits, guidance.strength)
        weight = guidance.at(known.flatten(1).float().mean(1))  # [B]
        return torch.lerp(null, logits, weight.to(logits.dtype).view(-1, *[1] * (logits.ndim - 1)))

    return predict


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
    """The condition for a doubled batch: its second half without labels, everything else repeated."""
    doubled = {name: torch.cat([value, value]) for name, value in cond.items()}
    return {**doubled, "label": torch.cat([cond["label"], torch.full_like(cond["label"], -1)])}


def _twice(layout: Layout) -> Layout:
    """The layout of a doubled batch; coordinates shared by the batch stay shared."""
    coords, valid = layout.coords, layout.valid
    if coords.shape[0] > 1:
        coords = torch.cat([coords, coords])
    return replace(layout, coords=coords, valid=None if valid is None else torch.cat([valid, valid]))
