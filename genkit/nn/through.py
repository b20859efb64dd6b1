"""Blocks one after the other, or what a cache does with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from genkit.interfaces import BLOCKS, Cache

State = TypeVar("State", Tensor, tuple[Tensor, Tensor])


def through(num_blocks: int, state: State, run: Callable[[int, State], State], cache: Cache | None) -> State:
    """What the last block gives, of run(i, state) -> state for i = 0 .. num_blocks - 1.

    Args:
        cache: under BLOCKS may stand a function that runs some of them and knows the rest.
    """
    instead = None if cache is None else cache.get(BLOCKS)
    if instead is not None:
        return instead(num_blocks, state, run)
    for i in range(num_blocks):
        state = run(i, state)
    return state
