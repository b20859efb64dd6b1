"""Retention in the plane: softmax attention whose scores fall with the Manhattan distance, whole or along rows and then columns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def manhattan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, grid: tuple[int, int], decomposed: bool = False
) -> Tensor:
    """o [B, N, H, V] with weights softmax_j(q_i . k_j K^-1/2 + d_ij log gamma), d_ij = |y_i - y_j| + |x_i - x_j| (Fan et al. 2024, "RMT", eq. 3-5).

    Torch's own attention computes it, for with a bias it is plain softmax attention.

    Args:
        q, k: [B, N, H, K], tokens row-major on the grid, one dtype with v. Differentiable, as v and log_decay.
        v: [B, N, H, V].
        log_decay: [H], log gamma.
        grid: (Y, X), Y X = N.
        decomposed: attend along the rows, then with the same q and k along the columns, each with its own softmax: O(N (Y + X)) instead of O(N^2). Its
            weights are a product of two; they equal the whole only on a grid of one row or one column.

    Raises: ValueError for shapes that do not fit.
    """
    Y, X = grid
    for name, given in (("q", q), ("k", k), ("v", v)):
        if given.ndim != 4 or given.shape[:3] != q.shape[:3] or given.shape[1] != Y * X:
            raise ValueError(
                f"manhattan: {name} must be [B, {Y * X}, H, channels] for the grid {Y} x {X}, got {list(given.shape)}"
            )
    if log_decay.shape != q.shape[2:3]:
        raise ValueError(f"manhattan: log_decay must be [{q.shape[2]}], got {list(log_decay.shape)}")
    if not decomposed:
        return _attend(q, k, v, _bias(grid, log_decay).to(v))
    q, k, v = (x.unflatten(1, grid) for x in (q, k, v))  # [B, Y, X, H, channels]
    v = _attend(q, k, v, _bias((1, X), log_decay).to(v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, X, Y, H, channels]
    return _attend(q, k, v, _bias((Y, 1), log_decay).to(v)).transpose(1, 2).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Over the third axis from behind, [..., n, H, channels]; bias [H, n, n]."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(-3, -2)


def _bias(grid: tuple[int, int], log_decay: Tensor) -> Tensor:
    """[H, n, n]: distance times log gamma."""
    axes = [torch.arange(n, device=log_decay.device) for n in grid]
    y, x = (place.flatten() for place in torch.meshgrid(*axes, indexing="ij"))
    distance = (y[:, None] - y).abs() + (x[:, None] - x).abs()
    return distance * log_decay[:, None, None]
