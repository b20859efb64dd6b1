"""Packed nodes in windows and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def to_windows(x: Tensor, window: int, *, dilation: int = 1, shift: int = 0, fill: float = 0) -> Tensor:
    """[M, ...] -> [W, window, ...]: `shift` fillers in front and as many behind as make whole groups of window x dilation; in a group, window d holds
    every dilation-th node from the d-th on. W = dilation ceil((M + shift) / (window dilation)).
    """
    group = window * dilation
    behind = -(len(x) + shift) % group
    rows = [0, 0] * (x.ndim - 1)
    filled = pad(x, (*rows, shift, behind), value=fill)
    return filled.unflatten(0, (-1, window, dilation)).transpose(1, 2).flatten(0, 1)


def from_windows(y: Tensor, count: int, *, dilation: int = 1, shift: int = 0) -> Tensor:
    """[W, window, ...] -> [count, ...]: the way back."""
    return y.unflatten(0, (-1, dilation)).transpose(1, 2).flatten(0, 2)[shift : shift + count]


def is_seen(batch_ids: Tensor, depth: Tensor | None, window: int, dilation: int, shift: int) -> Tensor:
    """[W, window, window] bool: which nodes of its window a node sees. Fillers see each other, so that no row is empty."""
    place = {"dilation": dilation, "shift": shift}
    sample = to_windows(batch_ids, window, fill=-1, **place)  # [W, window]
    seen = sample[:, :, None] == sample[:, None]
    if depth is not None:
        level = to_windows(depth, window, **place)
        seen &= level[:, :, None] >= level[:, None]
    return seen | torch.eye(window, dtype=torch.bool, device=seen.device)
