"""Ids drawn one after the other, or group after group, each from its distribution given those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, OnStep, PredictNext
from genkit.rng import Rng
from genkit.samplers.truncation import Truncation, draw


class Autoregressive:
    """Fills ids in the order of the predictor; ids of one step are drawn independently of each other.

    One uniform number per id, all drawn ahead, decides by inverting the cumulative distribution: a sample is a function of its stream alone.

    Args:
        temperature: divides the logits; 0 = the most likely id.
        top_k: only so many of the most likely ids may be drawn, ties included; 0 = all. A list is repeated over the steps.
        top_p: of the ids in falling order of probability, those after the one at which the sum exceeds this share may not be drawn.
        min_p: ids below this share of the largest probability may not be drawn.
        cache: keep keys and values between steps; without, everything is computed anew, with the same result.

    Raises: UsageError for an option out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | list[int] = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        cache: bool = True,
    ):
        ks = top_k if isinstance(top_k, list) else [top_k]
        if not ks:
            raise UsageError("sampler.top_k is an empty list; use 0 for all ids")
        self.truncations = [Truncation(temperature, k, top_p, min_p) for k in ks]
        self.cache = cache

    def __call__(self, predict: PredictNext, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """ids [B, *predict.shape] without a hole.

        Args:
            start: int64, -1 where an id is to be found; every other id is kept.
            rng: one stream per sample.
            on_step: is shown the ids with -1 where they are still unknown.

        Raises: UsageError for given ids outside the codebook.
        """
        given = predict.to_sequence(start)  # [B, N]
        check_ids(given, predict.codebook_size)
        uniform = rng.fork("draw").uniform(given.shape[1]).to(start.device)
        ids = given.clone()
        cache: Cache | None = {} if self.cache else None
        done, first = 0, prefix_steps(given, predict.counts)
        for step, count in enumerate(predict.counts):
            if step >= first:
                logits = predict(ids[:, :done], cache)  # [B, n, S]
                new = slice(done, done + count)
                drawn = draw(logits, uniform[:, new], self.truncations[step % len(self.truncations)])
                ids[:, new] = torch.where(given[:, new] >= 0, given[:, new], drawn)
            done += count
            if on_step is not None:
                on_step(step, len(predict.counts), predict.to_ids(ids))
            if predict.is_over(ids[:, :done]):
                break
        return predict.to_ids(ids)


def prefix_steps(given: Tensor, counts: Sequence[int]) -> int:
    """How many of the first steps draw nothing, since all their ids are given: the model reads these at once."""
    is_known = (given >= 0).all(0).tolist()
    done = 0
    for step, count in enumerate(counts):
        if not all(is_known[done : done + count]):
            return step
        done += count
    return len(counts)


def check_ids(given: Tensor, codebook_size: int) -> None:
    """Raises UsageError for a start with ids that are not in the codebook."""
    if int(given.max()) >= codebook_size:
        found = f"the start holds id {int(given.max())} of a codebook of {codebook_size}"
        raise UsageError(f"{found}; where an id is to be found, put -1")
