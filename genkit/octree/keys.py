"""Z-order (Morton) keys: the bits of x, y and z interleaved, the sample above them.

Bit i of x, y, z is bit 3i + 2, 3i + 1, 3i of the key, so that sorted keys walk a grid in z-order, `key >> 3` is the parent's key and `key & 7` =
4x + 2y + z the number of a child in its parent. The number of the sample stands in the bits from 48 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

BATCH_SHIFT = 48
MAX_DEPTH = 16  # 3 x 16 = 48 bits
MAX_BATCH = 2**15  # the sign bit stays free
_PLACE = (1 << BATCH_SHIFT) - 1

# Spread 16 bits to every third place, halves first: (shift, mask of what stays).
_SPREAD = (
    (32, 0x00FF00000000FFFF),
    (16, 0x00FF0000FF0000FF),
    (8, 0xF00F00F00F00F00F - (1 << 64)),
    (4, 0x30C30C30C30C30C3),
    (2, 0x9249249249249249 - (1 << 64)),
)
_BYTE: dict[torch.device, Tensor] = {}


def encode(xyz: Tensor, sample: Tensor | int | None = None) -> Tensor:
    """Integer coordinates [..., 3] in [0, 2^16), of the samples [...] -> keys [...] int64."""
    table = _table(xyz.device)
    key = _interleave(table, xyz & 255)
    if xyz.numel() and int(xyz.max()) > 255:  # a second look-up is only paid for where there is a high byte
        key = key | _interleave(table, xyz >> 8) << 24
    return key if sample is None else key | (torch.as_tensor(sample, device=xyz.device).long() << BATCH_SHIFT)


def decode(key: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [...] -> coordinates [..., 3] int64, samples [...] int64."""
    place = key & _PLACE
    return torch.stack([_compact(place >> 2), _compact(place >> 1), _compact(place)], -1), key >> BATCH_SHIFT


def parent(key: Tensor) -> Tensor:
    """The key one depth up, of the same sample."""
    return (key & _PLACE) >> 3 | (key >> BATCH_SHIFT << BATCH_SHIFT)


def first_child(key: Tensor) -> Tensor:
    """The key of child 0 one depth down, of the same sample."""
    return (key & _PLACE) << 3 | (key >> BATCH_SHIFT << BATCH_SHIFT)


def place(key: Tensor) -> Tensor:
    """The key without its sample."""
    return key & _PLACE


def sample(key: Tensor) -> Tensor:
    """The sample of a key."""
    return key >> BATCH_SHIFT


def _interleave(table: Tensor, xyz: Tensor) -> Tensor:
    spread = table.index_select(0, xyz.movedim(-1, 0).long().flatten()).view(3, *xyz.shape[:-1])
    return spread[0] << 2 | spread[1] << 1 | spread[2]


def _table(device: torch.device) -> Tensor:
    """A byte's bits at every third place, [256] int64."""
    if device not in _BYTE:
        with torch.inference_mode(False):
            x = torch.arange(256, device=device)
            for shift, mask in _SPREAD:
                x = (x | x << shift) & mask
            _BYTE[device] = x
    return _BYTE[device]


def _compact(x: Tensor) -> Tensor:
    """Every third bit, side by side: the inverse of spreading."""
    for (shift, _), mask in zip(reversed(_SPREAD), (*(m for _, m in _SPREAD[3::-1]), 0xFFFF), strict=True):
        x = x & _SPREAD[4][1] if shift == 2 else x
        x = (x | x >> shift) & mask
    return x
