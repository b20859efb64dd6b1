"""A cache folder of tokens (see genkit/data/cache.py) as a dataset: what a generator trains on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.data.sizes import pad_batch
from genkit.errors import UsageError
from genkit.interfaces import DataInfo
from genkit.rng import Rng


class Tokens:
    """ids [Q, *grid] int64, or z [C, *grid] float32 for a continuous tokenizer, mapped from disk.

    `info.shape` is the shape of the original images; `meta` is everything known of the tokens: grid, stride,
    codebook_size, num_levels, the measured mean and std of the latents, codebook usage and perplexity, and the two
    fingerprints. Samples in sizes of their own come padded with 0, with "size" [B, 2] in cells.

    `fetch` mirrors half of the samples where the cache holds them mirrored too, which it does where the images' dataset flips.

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
            self._mirrored = (
                np.load(folder / f"{self.word}_mirrored.npy", mmap_mode="r", allow_pickle=False)
                if self.meta.get("mirrored")
                else None
            )
            unit = self.meta.get("unit", 0)
            self.cells = np.load(folder / "sizes.npy", allow_pickle=False) if unit else None  # [N, 2]
            self._labels = torch.from_numpy(np.load(folder / "labels.npy", allow_pickle=False))
            self._keys: list[str] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
            both = self.meta["dataset_fingerprint"] + self.meta["tokenizer_fingerprint"]
            shape, names = tuple(self.meta["shape"]), tuple(self.meta["class_names"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UsageError(
                f"{path} is not a whole token cache ({error}); delete it and run `genkit cache` again"
            ) from None
        depth = self.meta["num_levels"] or self.meta["channels"]
        # Where every sample begins in a row that holds all.
        self._ends = None if self.cells is None else np.concatenate([[0], (depth * self.cells.prod(1)).cumsum()])
        self._depth = depth
        count = len(self._values) if self._ends is None else len(self._labels) * (len(self._values) == self._ends[-1])
        if not count == len(self._labels) == len(self._keys):
            raise UsageError(
                f"{path} is not a whole token cache (lengths differ); delete it and run `genkit cache` again"
            )
        fingerprint = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()
        self.info = DataInfo(
            shape, names, fingerprint, f"{path}: {len(self):,} samples, grid {self.meta['grid']}", unit
        )

    def __reduce__(self) -> Any:
        # A loader's worker maps the file itself; pickling the map would send all of it.
        return _open, (str(self.path),)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def sizes(self) -> np.ndarray | None:
        """[N, 2] pixels: every sample's own size; None where all have the same."""
        return None if self.cells is None else self.cells * self.meta["stride"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"ids" [Q, *grid] int64 or "z" [C, *grid] float32, "label" int, "index" int, "key" str}"""
        batch = self.__getitems__([index])
        return {self.word: batch[self.word][0], "label": int(batch["label"][0]), "index": index, "key": batch["key"][0]}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """{"ids" [B, Q, *grid] int64 or "z" [B, C, *grid] float32, "label", "index" [B] int64, "key" list[str]}"""
        return self._batch(np.asarray(indices, np.int64), None)

    def fetch(self, indices: Sequence[int] | np.ndarray, rng: Rng) -> dict[str, Any]:
        """As __getitems__, each sample mirrored with probability 1/2 where the cache holds that.

        Args:
            rng: one stream per sample; decides the flips as the images' own dataset does.
        """
        turned = rng.fork("flip").uniform().numpy() < 0.5 if self._mirrored is not None else None  # [B]
        return self._batch(np.asarray(indices, np.int64), turned)

    def _batch(self, index: np.ndarray, turned: np.ndarray | None) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "label": self._labels[torch.from_numpy(index)],
            "index": torch.from_numpy(index),
            "key": [self._keys[i] for i in index.tolist()],
        }
        if self.cells is not None and self._ends is not None:
            sources = [self._values] * len(index)
            if turned is not None:
                sources = [self._mirrored if turn else self._values for turn in turned]
            samples = [
                torch.from_numpy(
                    np.array(source[self._ends[i] : self._ends[i + 1]]).reshape(self._depth, *self.cells[i])
                )
                for i, source in zip(index.tolist(), sources, strict=True)
            ]
            padded, size = pad_batch(samples)
            return {self.word: padded.long() if self.word == "ids" else padded, "size": size, **batch}
        values = self._values[index]  # a copy in memory
        if turned is not None and self._mirrored is not None:
            values[turned] = self._mirrored[index[turned]]
        values = values.astype(np.int64) if self.word == "ids" else values
        return {self.word: torch.from_numpy(values), **batch}


def _open(path: str) -> Tokens:
    return Tokens(path=path)
