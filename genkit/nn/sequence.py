"""Tokens of a grid as a sequence that is read from the front: what stands before them, and parts of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from genkit.errors import UsageError
from genkit.interfaces import Layout

# coords of a layout -> {what was asked for: layout}. Layers and steps get the same object, so that rotary tables are computed once in its life.
_derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def behind_prefix(layout: Layout, prefix: int, place: Literal["zero", "identity"]) -> Layout:
    """The layout of `prefix` tokens without a place of their own and then those of a grid.

    Args:
        place: "identity": they count as being at 0. "zero": they have no coordinates (NaN), which makes rotary queries and keys 0.

    Raises: UsageError for padded layouts.
    """
    if layout.valid is not None:
        raise UsageError("autoregressive generators take whole grids; padding is not supported")
    found = _derived.setdefault(layout.coords, {})
    if (prefix, place) not in found:
        with torch.inference_mode(False):
            fill = math.nan if place == "zero" else 0.0
            front = layout.coords.new_full((layout.coords.shape[0], prefix, layout.coords.shape[2]), fill)
            found[prefix, place] = Layout(coords=torch.cat([front, layout.coords], dim=1), grid=None)
    return found[prefix, place]


def part(layout: Layout, first: int, last: int) -> Layout:
    """The tokens first .. last - 1 of a sequence."""
    if (first, last) == (0, layout.coords.shape[1]):
        return layout
    found = _derived.setdefault(layout.coords, {})
    if (first, last) not in found:
        with torch.inference_mode(False):
            found[first, last] = replace(layout, coords=layout.coords[:, first:last].clone(), grid=None)
    return found[first, last]
