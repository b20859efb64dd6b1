"""The compiled path of closest_triangle; see cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit import native


def refuses(points: Tensor, boxes: Tensor, triangles: Tensor, within: float) -> str | None:
    """Why these arguments need another path."""
    return None if points.device.type == "cpu" else f"it works in main memory, the points are on {points.device}"


def closest_triangle(points: Tensor, boxes: Tensor, triangles: Tensor, within: float) -> tuple[Tensor, Tensor]:
    """As `reference.closest_triangle`."""
    N = len(points)
    distance, number = torch.empty(N), torch.empty(N, dtype=torch.int64)
    call = native.function("closest_triangle", "closest_triangle", "pppppiif")
    depth = len(triangles).bit_length() - 1
    call(points.contiguous(), boxes.contiguous(), triangles.contiguous(), distance, number, N, depth, within)
    return distance, number
