"""A cache folder of tokens (see genkit/data/cache.py) as a dataset: what a generator trains on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.errors import UsageError
from genkit.interfaces import DataInfo


class Tokens:
    """ids [Q, *grid] int64, or z [C, *grid] float32 for a continuous tokenizer, mapped from disk.

    `info.shape` is the shape of the original images; `meta` is everything known of the tokens: grid, stride,
    codebook_size, num_levels, the measured mean and std of the latents, codebook usage and perplexity, and the two
    fingerprints.

    Args:
        path: folder written by `genkit.data.cache.build`.

    Raises: UsageError when the folder is not a whole cache.
    """

    def __init__(self, *, path: str) -> None:
        self.path = folder = Path(path)
        if not folder.is_dir():
            raise UsageError(f"no such token cache: {path}; `genkit cache` makes one")
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.word = "ids" if self.meta["num_levels"] else "z"
            self._values = np.load(folder / f"{self.word}.npy", mmap_mode="r", allow_pickle=False)
            self._labels = torch.from_numpy(np.load(folder / "labels.npy", allow_pickle=False))
            self._keys: list[str] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
            both = self.meta["dataset_fingerprint"] + self.meta["tokenizer_fingerprint"]
            shape, names = tuple(self.meta["shape"]), tuple(self.meta["class_names"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UsageError(
                f"{path} is not a whole token cache ({error}); delete it and run `genkit cache` again"
            ) from None
        if not len(self._values) == len(self._labels) == len(self._keys):
            raise UsageError(
                f"{path} is not a whole token cache (lengths differ); delete it and run `genkit cache` again"
            )
        fingerprint = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()
        self.info = DataInfo(shape, names, fingerprint, f"{path}: {len(self):,} samples, grid {self.meta['grid']}")

    def __reduce__(self) -> Any:
        # A loader's worker maps the file itself; pickling the map would send all of it.
        return _open, (str(self.path),)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"ids" [Q, *grid] int64 or "z" [C, *grid] float32, "label" int, "index" int, "key" str}"""
        batch = self.__getitems__([index])
        return {self.word: batch[self.word][0], "label": int(batch["label"][0]), "index": index, "key": batch["key"][0]}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """{"ids" [B, Q, *grid] int64 or "z" [B, C, *grid] float32, "label", "index" [B] int64, "key" list[str]}"""
        index = np.asarray(indices, np.int64)
        values = self._values[index]  # a copy in memory
        values = values.astype(np.int64) if self.word == "ids" else values
        return {
            self.word: torch.from_numpy(values),
            "label": self._labels[torch.from_numpy(index)],
            "index": torch.from_numpy(index),
            "key": [self._keys[i] for i in index.tolist()],
        }


def _open(path: str) -> Tokens:
    return Tokens(path=path)
