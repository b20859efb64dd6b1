"""A backbone from step to step of one sampling run: which calls are whole, and what the others may live on.

A call is one of the model, not of the sampler: Heun makes two per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout

What = Literal["plain", "full", "reuse"]


@dataclass(frozen=True)
class Schedule:
    """Calls 0 .. first - 1 are plain; call `first` and every period-th after it are full, and kept; those in between reuse what was kept.

    At most `most` calls are full where it is given, and those after them reuse the last.
    """

    first: int
    period: int
    most: int | None = None

    def last(self, call: int) -> int:
        """The latest full call at or before this one; of plain calls, the first full one."""
        count = max(0, call - self.first) // self.period
        return self.first + self.period * (count if self.most is None else min(count, self.most - 1))

    def what(self, call: int) -> What:
        if call < self.first:
            return "plain"
        return "full" if call == self.last(call) else "reuse"


class Kept(Protocol):
    """What is carried for batches of one shape."""

    def cache(self, what: What, t: Tensor | None) -> Cache | None:
        """The cache for a call at time t."""


class Carried:
    """model(x, t, cond, layout) with a cache of its own, and a count of its calls.

    Batches of different shapes keep their own: a guided batch is twice as long as a plain one, and where guidance has an interval both occur. What was kept
    before the latest full call is stale; a batch that has nothing fresher is computed in full, whatever the schedule says.
    """

    def __init__(self, model: Any, schedule: Schedule, make: Callable[[], Kept]):
        self.model, self.schedule, self._make = model, schedule, make
        self.calls = 0
        self.kept: dict[torch.Size, Kept] = {}
        self._made: dict[torch.Size, int] = {}  # shape -> the call that kept

    @property
    def told(self) -> Any:
        """What reads the condition, see nn.told; None where nothing does."""
        return getattr(self.model, "told", None)

    def __call__(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        call, shape = self.calls, x.shape
        self.calls += 1
        if shape not in self.kept:
            self.kept[shape] = self._make()
        what = self.schedule.what(call)
        if what == "reuse" and self._made.get(shape, -1) < self.schedule.last(call):
            what = "full"
        if what != "reuse":
            self._made[shape] = call
        return self.model(x, t, cond, layout, self.kept[shape].cache(what, t))


def heeding(model: Any, key: str) -> list[Any]:
    """The modules of a network that ask a cache for this key."""
    return [module for module in model.modules() if key in getattr(module, "heeds", ())]


def check_schedule(name: str, full_steps: int, period: int, most: int | None = None) -> Schedule:
    """Raises UsageError for numbers that make no schedule."""
    if most is not None and most < 1:
        raise UsageError(f"sampler.reuse.refreshes={most} must be at least 1, or none given (reuse.type={name})")
    if full_steps < 0 or period < 1:
        raise UsageError(
            f"sampler.reuse.full_steps={full_steps} must be at least 0 and sampler.reuse.period={period} at least 1 (reuse.type={name})"
        )
    return Schedule(full_steps, period, most)
