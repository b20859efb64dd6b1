"""Which ids of an image share a lane: a stretch of bytes that can be decoded, or lost, on its own."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from genkit.codec.stream import Ints

Packets = Literal["none", "rows", "interleaved"]
STREAM_IMAGES = 8  # share a lane where a generator predicts: to decode one is to decode them all, and each alone would take 5 % more bytes
PACKETS: tuple[str, ...] = get_args(Packets)


def split(grid: tuple[int, ...], packets: str) -> list[Ints]:
    """The positions of each lane of an image, as numbers into its flattened grid; together every position once.

    "none": one lane. "rows": one per row of the grid. "interleaved": four lanes (fewer on a thin grid), every other position of every other row,
    so that what is lost with one of them has its neighbours in the others.
    """
    numbers = np.arange(math.prod(grid)).reshape(-1, grid[-1])
    if packets == "rows":
        return list(numbers)
    if packets == "interleaved":
        phases = [numbers[y::2, x::2].ravel() for y in (0, 1) for x in (0, 1)]
        return [phase for phase in phases if len(phase)]
    return [numbers.ravel()]


def count(grid: tuple[int, ...], packets: str) -> int:
    """len(split(grid, packets)), without building it."""
    rows, columns = math.prod(grid[:-1]), grid[-1]
    return {"rows": rows, "interleaved": min(rows, 2) * min(columns, 2)}.get(packets, 1)
