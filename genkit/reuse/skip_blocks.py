"""Feature caching: what the middle blocks add is taken from earlier steps (Ma et al., "DeepCache", CVPR 2024; for transformers Chen et al., "Delta-DiT", 2024;
foretold along the time as Liu et al., "TaylorSeer", ICCV 2025)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import BLOCKS, Cache
from genkit.reuse.calls import Carried, What, check_schedule

State = Tensor | tuple[Tensor, Tensor]


class SkipBlocks:
    """Between full calls only the outer blocks run: h -> last(first(h) + D), with D = what the middle ones added, as foretold from the calls that were full.

    Serves backbones whose blocks follow one another: dit, fit, dimsum.

    Args:
        full_steps: so many calls of the model at the beginning are full.
        period: one call in so many is full from then on.
        order: D is the polynomial of this degree in t through the latest full calls; 0 = as it was.
        first, last: so many blocks at both ends always run; at least the first, which sees the new x.
    """

    target = "z"

    def __init__(self, *, full_steps: int = 3, period: int = 3, order: int = 1, first: int = 1, last: int = 0):
        if order < 0 or first < 1 or last < 0:
            raise UsageError(
                f"sampler.reuse.order={order} and sampler.reuse.last={last} must not be negative, sampler.reuse.first={first} at least 1"
            )
        self.schedule = check_schedule("skip_blocks", full_steps, period)
        self.order, self.first, self.last = order, first, last

    def start(self, model: Any) -> Carried:
        """Raises UsageError for a network whose blocks cannot be skipped."""
        if BLOCKS not in getattr(model, "heeds", ()):
            raise UsageError(
                f"sampler.reuse.type=skip_blocks serves backbones whose blocks follow one another (dit, fit, dimsum); {type(model).__name__} is none of them"
            )
        return Carried(model, self.schedule, lambda: Added(self))


class Added:
    """What the middle blocks added in the latest full calls."""

    def __init__(self, options: SkipBlocks):
        self.options = options
        self.history: deque[tuple[float, list[Tensor]]] = deque(maxlen=options.order + 1)  # (t, D), no t twice

    def cache(self, what: What, t: Tensor | None) -> Cache:
        time = 0.0 if t is None else float(t.reshape(-1)[0])

        def blocks(count: int, state: State, run: Callable[[int, State], State]) -> State:
            first, last = self.options.first, self.options.last
            if first + last >= count:
                raise UsageError(
                    f"sampler.reuse.first={first} and last={last} leave none of {count} blocks to skip; lower them"
                )
            for i in range(first):
                state = run(i, state)
            if what == "reuse":
                state = _whole([a + d for a, d in zip(_parts(state), self.foretold(time), strict=True)])
            else:
                before = state
                for i in range(first, count - last):
                    state = run(i, state)
                self.keep(time, [a - b for a, b in zip(_parts(state), _parts(before), strict=True)])
            for i in range(count - last, count):
                state = run(i, state)
            return state

        return {BLOCKS: blocks}

    def keep(self, time: float, added: list[Tensor]) -> None:
        if self.history and self.history[-1][0] == time:
            self.history.pop()
        self.history.append((time, added))

    def foretold(self, time: float) -> list[Tensor]:
        """Lagrange's polynomial through what is known."""
        found = [torch.zeros_like(part) for part in self.history[-1][1]]
        for here, added in self.history:
            others = [there for there, _ in self.history if there != here]
            weight = math.prod((time - there) / (here - there) for there in others)
            for total, part in zip(found, added, strict=True):
                total.add_(part, alpha=weight)
        return found


def _parts(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _whole(parts: list[Tensor]) -> State:
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])
