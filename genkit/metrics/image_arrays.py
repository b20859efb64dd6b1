"""Images that lie as one array in an npz."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genkit.data.memory import to_float
from genkit.errors import GenkitError
from genkit.metrics.arrays import Npz
from genkit.metrics.image_set import Images


def from_npz(path: Path) -> Images:
    """`arr_0` uint8 [N, Y, X, C] or [N, C, Y, X] or [N, Y, X], and, where it is there, `arr_1` or `label` [N] of integers.

    An array that is not compressed is mapped, not loaded: it may be larger than the memory.

    Raises: GenkitError for another content, naming the keys that were found.
    """
    return _Pixels(Npz(path))


class _Pixels(Images):
    def __init__(self, arrays: Npz):
        path, found = arrays.path, arrays.found
        if "arr_0" not in arrays:
            raise GenkitError(f"{path} has no arr_0 (images, uint8 [N, Y, X, C] or [N, C, Y, X]); found {found}")
        shape, dtype = arrays.headers["arr_0"].shape, arrays.headers["arr_0"].dtype
        full = (*shape, 1) if len(shape) == 3 else shape
        if dtype != np.uint8 or len(full) != 4 or not {full[-1], full[1]} & {1, 3} or 0 in full:
            raise GenkitError(
                f"{path}: arr_0 must be uint8 [N, Y, X, C] or [N, C, Y, X] with 1 or 3 channels; found {found}"
            )
        self._arrays = arrays
        self._full = full
        self._channels_last = full[-1] in (1, 3)
        key = next((key for key in ("arr_1", "label") if key in arrays), None)
        self._labels = torch.full((full[0],), -1)
        if key is not None:
            header = arrays.headers[key]
            if header.shape != (full[0],) or header.dtype.kind not in "iu":
                raise GenkitError(
                    f"{path}: {full[0]} images need as many integers as labels, but {key} is {header.dtype} {list(header.shape)}"
                )
            self._labels = torch.from_numpy(arrays[key].astype(np.int64))
        chw = (full[3], full[1], full[2]) if self._channels_last else full[1:]
        super().__init__(path.name, chw, full[0], key is not None)

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(numbers, np.int64)
        return to_float(torch.from_numpy(self._chosen(chosen))), self._labels[torch.from_numpy(chosen)]

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self.take(range(first, min(last, self.count)))

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        return self._arrays.map("arr_0").reshape(self._full)

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        """[B, C, Y, X] uint8, a copy."""
        pixels = self._pixels[numbers]
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if self._channels_last else pixels)

    def _hash(self) -> str:
        digest = hashlib.sha256(repr((self.count, *self.shape)).encode())
        for start in range(0, self.count, 256):
            digest.update(self._chosen(np.arange(start, min(start + 256, self.count))).data)
        return digest.hexdigest()
