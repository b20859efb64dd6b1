"""Conditions that are left out now and then while training, for classifier-free guidance (Ho and Salimans, 2022)."""

from __future__ import annotations

import torch

from genkit.interfaces import Cond
from genkit.rng import Rng


def drop(cond: Cond, probability: float, rng: Rng) -> Cond:
    """The condition with everything of a sample left out with this probability: label -1, a context or text of zeros. Only how much was said stays."""
    if not cond:
        return cond
    dropped = rng.fork("cond").uniform() < probability  # [B]
    nothing = {"label": -1}
    left = {
        name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), nothing.get(name, 0), value)
        for name, value in cond.items()
    }
    return left | {name: cond[name] for name in ("said",) if name in cond}
