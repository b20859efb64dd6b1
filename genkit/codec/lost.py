"""Ids that were lost on the way, filled in from those that arrived.

Mao et al., 2024 (arXiv 2307.08265), restore lost indices with a transformer that slides over the map; here the masked generator that makes images
does it, which is the same task with fewer holes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.codec.lanes import split
from genkit.codec.model import masked_objective
from genkit.codec.stream import Ints
from genkit.nn.layout import dense_layout
from genkit.rng import Rng
from genkit.samplers.masked import Masked

# More steps, the surest ids first, make what is filled in agree with itself, but each id no likelier: at 20 % loss of small images 4 steps are 0.1 to
# 0.3 dB worse.
NUM_STEPS = 1


class _Likeliest(Rng):
    """Draws nothing: of a distribution its mode. A lost id should come back as it most probably was."""

    def fork(self, word: str) -> _Likeliest:
        return self

    def categorical(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        return logits.argmax(-1)


def by_generator(pipeline: Any, ids: Tensor, num_steps: int = NUM_STEPS) -> Tensor:
    """ids [B, Q, *grid] int64 with -1 where lost -> without a hole: the generator's most probable ids; with several steps the surest first.

    Args:
        pipeline: of a masked generator of the same tokens; asked without a class.
    """
    B, _, *grid = ids.shape
    predict = masked_objective(pipeline).predictor(
        pipeline.backbone,
        {"label": torch.full((B,), -1, device=pipeline.device)},
        dense_layout(tuple(grid), device=pipeline.device),
    )
    sampler = Masked(num_steps=num_steps, temperature=0.0)
    with torch.inference_mode():
        found = sampler(predict, ids.to(pipeline.device), _Likeliest([0] * B, device=pipeline.device))
    return found.to(ids.device)


def by_nearest(ids: Ints) -> Ints:
    """ids [Q, *grid] with -1 where lost -> each lost id a copy of the nearest known one of its level; 0 where a level has none."""
    filled = ids.copy()
    grid = ids.shape[1:]
    places = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)  # [N, A]
    for level in filled.reshape(len(ids), -1):
        known, lost = np.flatnonzero(level >= 0), np.flatnonzero(level < 0)
        if not len(known):
            level[:] = 0
            continue
        for some in np.array_split(lost, -(-len(lost) * len(known) // 2**22) or 1):
            distance = np.square(places[some, None] - places[known]).sum(-1)  # [L, K]
            level[some] = level[known[distance.argmin(1)]]
    return filled


def lose(images: Sequence[Ints], fraction: float, seed: int, packets: str) -> list[Ints]:
    """The same ids with about this fraction replaced by -1: whole packets where there are any, else single places, all levels of a place together.

    What image i loses depends on the seed and on i alone.
    """
    damaged = []
    for i, ids in enumerate(images):
        grid = ids.shape[1:]
        parts = split(grid, packets) if packets != "none" else list(np.arange(math.prod(grid))[:, None])
        is_lost = Rng.at(seed, i, 1).uniform(len(parts))[0].numpy() < fraction
        flat = ids.reshape(len(ids), -1).copy()
        for part in (part for part, gone in zip(parts, is_lost, strict=True) if gone):
            flat[:, part] = -1
        damaged.append(flat.reshape(ids.shape))
    return damaged
