"""Classifier-free guidance (Ho and Salimans, 2022) as a wrapper around what a sampler calls.

out = uncond + strength (cond - uncond), one forward pass with the batch doubled; uncond sees label -1. Strength 1 is no
guidance, 0 is the unconditional model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.interfaces import Cache, Cond, Layout, Predict, PredictIds


def guide(
    objective: Any,
    model: Any,
    cond: Cond,
    layout: Layout,
    strength: float,
    schedule: Literal["constant", "linear"] = "constant",
) -> Predict | PredictIds:
    """What the sampler of this objective may call, guided.

    Args:
        strength: >= 0; 1 gives the plain predictor, without the second half of the batch.
        schedule: "constant", or for ids "linear": from 1 to strength with the fraction of a sample's ids that are
            known, so that the first tokens, drawn from almost nothing, keep their variety (as MUSE, 2023, and MAR, 2024).
    """
    if objective.target == "ids":
        return guide_ids(objective, model, cond, layout, strength, schedule)
    return guide_latents(objective, model, cond, layout, strength)


def guide_ids(
    objective: Any,
    model: Any,
    cond: Cond,
    layout: Layout,
    strength: float,
    schedule: Literal["constant", "linear"] = "constant",
) -> PredictIds:
    """(ids [B, Q, *grid], known, cache) -> guided logits [B, Q, *grid, S]. A cache holds both halves of the doubled
    batch."""
    if strength == 1 or "label" not in cond:
        return objective.predictor(model, cond, layout)
    predict_both: Any = objective.predictor(model, _and_null(cond), _twice(layout))

    @wraps(predict_both)
    def predict(ids: Tensor, known: Tensor, cache: Cache | None = None) -> Tensor:
        both = predict_both(torch.cat([ids, ids]), torch.cat([known, known]), cache)
        logits, null = both.chunk(2)
        if schedule == "constant":
            return torch.lerp(null, logits, strength)
        fraction = known.flatten(1).float().mean(1)  # [B]
        weight = 1 + (strength - 1) * fraction
        return torch.lerp(null, logits, weight.to(logits.dtype).view(-1, *[1] * (logits.ndim - 1)))

    return predict


def guide_latents(objective: Any, model: Any, cond: Cond, layout: Layout, strength: float) -> Predict:
    """(x_t [B, C, *grid], t) -> guided (x0, noise). Both are linear in the network's output, so each is guided the
    same way."""
    if strength == 1 or "label" not in cond:
        return objective.predictor(model, cond, layout)
    predict_both: Any = objective.predictor(model, _and_null(cond), _twice(layout))

    @wraps(predict_both)  # keeps predict.path
    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        (x0, x0_null), (noise, noise_null) = (both.chunk(2) for both in predict_both(torch.cat([x_t, x_t]), t))
        return torch.lerp(x0_null, x0, strength), torch.lerp(noise_null, noise, strength)

    return predict


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
