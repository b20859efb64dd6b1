"""What the objectives of noisy latents share."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.interfaces import Cond
from genkit.rng import Rng


def drop_labels(cond: Cond, probability: float, rng: Rng) -> Cond:
    """The condition with labels replaced by -1, the null class, each with this probability."""
    if "label" not in cond:
        return cond
    dropped = rng.fork("cond").uniform() < probability  # [B]
    return {**cond, "label": torch.where(dropped, -1, cond["label"])}


def per_sample(values: Tensor) -> Tensor:
    """[B, ...] -> their means [B]."""
    return values.flatten(1).mean(1)
