"""Rows added up by number: what averages points in cells and blends nodes at places."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_sum = Operation("scatter_sum")


def scatter_sum(x: Tensor, rows: Tensor, count: int, *, path: str | None = None) -> Tensor:
    """y [count, C]: y_n is the sum of all x_p with rows_p = n, in the order of p; 0 where there is none.

    Args:
        x: [P, C]. Differentiable.
        rows: [P] int64 in 0 .. count - 1.
        path: see genkit.dispatch.

    Raises: ValueError for shapes that do not fit, and rows out of range; UsageError for a path that cannot run.
    """
    if x.ndim != 2 or rows.shape != x.shape[:1] or rows.dtype != torch.int64 or rows.device != x.device:
        raise ValueError(
            f"scatter_sum: x must be [P, C] and rows int64 [P] beside it, got {list(x.shape)} on {x.device} and {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    if len(rows):
        least, greatest = (int(x) for x in rows.aminmax())
        if least < 0 or greatest >= count:
            raise ValueError(f"scatter_sum: rows reach from {least} to {greatest}, count is {count}")
    return _sum(path, x, rows, count)
