"""Each id given those before it, in raster order (LlamaGen, 2024; with several ids per place: Lee et al., RQ-Transformer, CVPR 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout, PredictNext
from genkit.objectives.dropping import drop
from genkit.rng import Rng


class NextToken:
    """Cross-entropy of every id, the mean over the ids of each sample.

    Labels are dropped to -1 with probability cond_drop, which trains the null class of classifier-free guidance. Works with backbones that have
    `next_logits` (gpt, rq).

    Args:
        label_smoothing: of the cross-entropy.
        cond_drop: probability in [0, 1].
    """

    target = "ids"
    asks = "next ids"
    draws = "next"

    def __init__(self, *, label_smoothing: float = 0.0, cond_drop: float = 0.1):
        check_fractions(label_smoothing=label_smoothing, cond_drop=cond_drop)
        self.label_smoothing, self.cond_drop = label_smoothing, cond_drop

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"nll": [B] nats per id, "_accuracy": [B]} for ids target [B, Q, *grid]."""
        check_grid(target, layout)
        logits = model(target, None, drop(cond, self.cond_drop, rng), layout).float()  # [B, Q, *grid, S]
        return losses(logits.flatten(1, -2), target.flatten(1), self.label_smoothing)

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> PredictNext:
        """What samplers of sequences call."""
        return NextIds(model, cond, layout)


class NextIds:
    """PredictNext of a backbone with `next_logits`, `step_counts` and ids in raster order, those of a place one after the other."""

    def __init__(self, model: Any, cond: Cond, layout: Layout):
        assert layout.grid is not None
        self.model, self.cond, self.layout = model, cond, layout
        self.codebook_size: int = model.config.codebook_size
        self.counts: Sequence[int] = model.step_counts(layout.grid)
        self.shape: tuple[int, ...] = (len(self.counts) // math.prod(layout.grid), *layout.grid)

    def __call__(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        return self.model.next_logits(ids, self.cond, self.layout, cache)

    def several(self, ids: Tensor, cache: Cache | None, count: int) -> Tensor:
        """Logits [B, count, S] of the last `count` - 1 of the ids and of the one after them, for parallel decoding."""
        return self.model.next_logits(ids, self.cond, self.layout, cache, count)

    def repeated(self, times: int) -> NextIds:
        return NextIds(self.model, repeat(self.cond, times), self.layout)

    def to_sequence(self, ids: Tensor) -> Tensor:
        return ids.flatten(2).transpose(1, 2).flatten(1)

    def to_ids(self, sequence: Tensor) -> Tensor:
        return sequence.unflatten(1, (-1, self.shape[0])).transpose(1, 2).unflatten(2, self.shape[1:])

    def is_over(self, ids: Tensor) -> bool:
        return False


def losses(logits: Tensor, answers: Tensor, label_smoothing: float) -> dict[str, Tensor]:
    """{"nll", "_accuracy"} [B] of logits [B, n, S] against answers [B, n]."""
    nll = cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none", label_smoothing=label_smoothing)
    with torch.no_grad():
        is_right = logits.gather(-1, answers.unsqueeze(-1)).squeeze(-1) >= logits.amax(-1)
    return {"nll": nll.view(answers.shape).mean(1), "_accuracy": is_right.float().mean(1)}


def repeat(cond: Cond, times: int) -> Cond:
    """The condition with every sample so many times in a row."""
    return {name: value.repeat_interleave(times, dim=0) for name, value in cond.items()}


def check_fractions(**values: float) -> None:
    """Raises UsageError for an option outside [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UsageError(f"objective.{name}={value} must be in [0, 1]")


def check_grid(ids: Tensor, layout: Layout) -> None:
    """Raises UsageError for ids that do not lie on the grid of the latents, as those of tokenizers that code scale after scale."""
    if tuple(ids.shape[2:]) != layout.grid:
        raise UsageError(
            f"the tokenizer makes ids of {list(ids.shape[2:])} per image on a grid of {list(layout.grid or ())}; "
            "this generator needs an id for every place of the grid: take objective.type=next_scale for such ids, or another tokenizer"
        )
