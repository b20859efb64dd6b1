"""Sequences drawn several ids at a time, with the result of drawing one by one: guesses are all checked at once, and those that hold are kept.

Song et al., "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving", ICML 2021; with sampling: Teng et al., "Accelerating
Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding", ICLR 2025. Difference from the latter: each id is decided by one
uniform number that was drawn ahead, so that a guess holds when the very id comes out that would have been drawn, and the sample is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, OnStep, PredictNext
from genkit.rng import Rng
from genkit.samplers.autoregressive import check_ids, prefix_steps
from genkit.samplers.truncation import Truncation, draw


class Jacobi:
    """As the sampler autoregressive with the same options: the same ids for the same streams, but where two ids are equally likely to rounding.

    A call of the model gives the distributions of `window` ids given guesses of those between; guesses are what came out of the call before. The ids up
    to the first wrong guess are right, in the batch those that are right in all of its samples. After `calls` one knows how many calls were needed.

    Args:
        window: ids that are looked at in one call, >= 1.
        temperature, top_k, top_p, min_p: see samplers/autoregressive.py.

    Raises: UsageError for an option out of range, and for generators whose ids are not drawn one by one by attention.
    """

    def __init__(
        self,
        *,
        window: int = 8,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ):
        if window < 1:
            raise UsageError(f"sampler.window={window} must be at least 1")
        self.window, self.how = window, Truncation(temperature, top_k, top_p, min_p)
        self.calls = 0

    def __call__(self, predict: PredictNext, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """ids [B, *predict.shape]; ids given in the start (not -1) are kept."""
        if not hasattr(predict, "several") or any(count != 1 for count in predict.counts):
            raise UsageError(
                "sampler.type=jacobi guesses ids that are drawn one by one; this generator is sampled by autoregressive"
            )
        given = predict.to_sequence(start)
        check_ids(given, predict.codebook_size)
        N = given.shape[1]
        uniform = rng.fork("draw").uniform(N).to(start.device)
        ids = given.clamp_min(0)  # right before `done`, behind it guesses
        done, cache = prefix_steps(given, predict.counts), Cache()
        self.calls = 0
        while done < N:
            count = min(self.window, N - done)
            logits = predict.several(ids[:, : done + count - 1], cache, count)  # [B, count, S]
            here = slice(done, done + count)
            drawn = draw(logits, uniform[:, here], self.how)
            drawn = torch.where(given[:, here] >= 0, given[:, here], drawn)
            holds = (drawn == ids[:, here]).all(0)  # [count]
            right = min(count, int(holds.int().cumprod(0).sum()) + 1)
            ids[:, here] = drawn
            ids[:, done + count :] = torch.where(given[:, done + count :] >= 0, given[:, done + count :], drawn[:, -1:])
            forget(cache, count - right)
            done += right
            self.calls += 1
            if on_step is not None:
                shown = torch.arange(N, device=ids.device) < done
                on_step(done - 1, N, predict.to_ids(torch.where(shown, ids, -1)))
        return predict.to_ids(ids)


def forget(cache: Cache, count: int) -> None:
    """Take the last `count` tokens out of a cache. Raises UsageError where a mixer keeps something that cannot be taken back."""
    for name, value in cache.items():
        if isinstance(value, dict):
            forget(value, count)
        elif name == "seen":
            cache[name] = value - count
        elif hasattr(value, "truncate"):
            value.truncate(value.length - count)
        elif name not in ("num_tokens", "context", "quick"):
            raise UsageError(
                "sampler.type=jacobi takes back what did not hold, which only attention can; use sampler.type=autoregressive"
            )
