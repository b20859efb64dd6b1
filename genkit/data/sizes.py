"""Images of sizes of their own: how large each becomes, and how a batch holds them.

Sizes are written rows x columns, "48x64", and held as (Y, X). A budget is an area, so that every aspect ratio costs about as many tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError

Size = tuple[int, int]  # (Y, X)


def parse_size(text: str | int | Sequence[int], option: str = "size") -> Size:
    """(Y, X) from "48x64" (rows x columns), "48", 48 or (48, 64). Raises UsageError for anything else."""
    found: list[int] | None = None
    if isinstance(text, int):
        found = [text]
    elif not isinstance(text, str):
        found = [int(side) for side in text]
    elif match := re.fullmatch(r"\s*(\d+)\s*(?:[xX×]\s*(\d+)\s*)?", text):
        found = [int(side) for side in match.groups() if side is not None]
    if found is None or len(found) not in (1, 2) or min(found) < 1:
        raise UsageError(f"{option}={text} is no size; write rows x columns, as in 48x64, or one number for a square")
    return found[0], found[-1]


def show_size(size: Sequence[int]) -> str:
    """ "48x64"."""
    return "x".join(map(str, size))


def named_size(size: str | Sequence[int] | None, rope: Mapping[str, Any] | None) -> str:
    """What tells files of one run apart: "-48x64-ntk-paper"; empty for the trained size."""
    words = [] if size is None else [show_size(parse_size(size))]
    asked = {"method": None, "gain": None} | dict(rope or {})
    words += [
        {"per_axis": "axes" if value else "longest"}.get(key, str(value))
        for key, value in asked.items()
        if value is not None
    ]
    return "".join(f"-{word}" for word in words)


def within_budget(size: Size, budget: int, unit: int) -> Size:
    """The size that an image of `size` is brought to: its own aspect ratio, at most `budget` pixels, sides in multiples of `unit`.

    As FiT (Lu et al., 2024): larger images shrink to the budget, smaller ones stay as they are, both sides are rounded down, and only an image narrower
    than one unit grows to that. Unlike there, its other side is then cut to the budget.
    """
    y, x = float(size[0]), float(size[1])
    scale = min(1.0, math.sqrt(budget / (y * x)))
    y, x = y * scale, x * scale
    if min(y, x) < unit:
        longest = budget / unit
        grown = unit / min(y, x)
        y, x = (unit, min(x * grown, longest)) if y < x else (min(y * grown, longest), unit)
    # 1e-9: a side that the scale should have brought to a multiple must not fall below it by rounding.
    return max(1, int(y / unit + 1e-9)) * unit, max(1, int(x / unit + 1e-9)) * unit


def pad_batch(images: Sequence[Tensor], sides: Size | None = None) -> tuple[Tensor, Tensor]:
    """Images [C, y, x] of any sizes -> ([B, C, Y, X] with each in its top left corner and 0 around it, their sizes [B, 2] int64).

    Args:
        sides: (Y, X); by default the longest of the batch.
    """
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).view(-1, 2)
    Y, X = sides or (tuple(sizes.amax(0).tolist()) if len(images) else (0, 0))
    channels = images[0].shape[0] if images else 0
    x = torch.zeros(len(images), channels, Y, X, dtype=images[0].dtype if images else torch.float32)
    for row, image in zip(x, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return x, sizes
