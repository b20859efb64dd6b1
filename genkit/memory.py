"""Memory for large results that is kept when they are dropped, and used again by the next result of the same size.

Above 32 MB the C library asks the system for fresh pages at every call and gives them back afterwards. Touching such pages for the first time takes
longer than a scan takes to fill them; a training step, which makes results of the same few sizes over and over, pays for it every time.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 32 << 20  # bytes: from here on the C library does not keep memory itself
MOST = 512 << 20  # bytes that wait for their next use, at most

# Blocks by their bytes. Whoever drops a result, and the garbage collector wherever it runs, gives back: lists are only appended to and popped from.
_waiting: defaultdict[int, list[Tensor]] = defaultdict(list)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous tensor on the CPU with any contents, as torch.empty; a large one may lie where a dropped one lay."""
    size = math.prod(shape) * dtype.itemsize
    return torch.empty(shape, dtype=dtype) if size < LARGE else _placed(shape, dtype, _taken(size))


def empty_like(x: Tensor) -> Tensor:
    """`empty` of the shape and type of a tensor on the CPU."""
    return empty(*x.shape, dtype=x.dtype)


def release() -> None:
    """Give what waits back to the system."""
    _waiting.clear()


def _taken(size: int) -> Tensor:
    """A block of that many bytes: the latest to be dropped, the likeliest to be in a cache still; else a new one."""
    try:
        return _waiting[size].pop()
    except IndexError:
        return torch.empty(size, dtype=torch.uint8)


def _placed(shape: Sequence[int], dtype: torch.dtype, block: Tensor) -> Tensor:
    # A tensor made from a NumPy array holds that array until its storage is freed, with all views of it: then the block is free again.
    array = block.numpy()
    weakref.finalize(array, _give_back, block).atexit = False
    return torch.from_numpy(array).view(dtype).view(tuple(shape))


def _give_back(block: Tensor) -> None:
    if len(block) + sum(size * len(_waiting[size]) for size in list(_waiting)) > MOST:
        release()
    if len(block) <= MOST:
        _waiting[len(block)].append(block)
