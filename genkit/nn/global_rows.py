"""Rows of a batch that is spread over processes, addressed as if it lay on one: rank 0's rows first, then rank 1's, and so on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def count_rows(rows: Tensor) -> tuple[int, int]:
    """(rows of all processes together, number of the first row of this process) for rows [G, N, d] with any N per process."""
    N = rows.shape[1]
    if not is_distributed():
        return N, 0
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = N
    dist.all_reduce(counts)
    return int(counts.sum()), int(counts[: dist.get_rank()].sum())


def take_rows(rows: Tensor, wanted: Tensor, first: int) -> Tensor:
    """The wanted rows of the global batch, the same bits on every process.

    Args:
        rows: [N, d], the rows of this process.
        wanted: [R] int64, numbers in the global batch, equal on every process.
        first: number of this process's first row in the global batch.
    """
    if not is_distributed():
        return rows[wanted]
    local = wanted - first
    is_own = (local >= 0) & (local < len(rows))
    taken = rows.new_zeros(len(wanted), rows.shape[1])
    taken[is_own] = rows[local[is_own]]
    dist.all_reduce(taken)  # exactly one process adds anything but zero to a row
    return taken
