"""Octree tokens of a dataset of shapes, made once: what a generator of shapes trains on.

A folder like the other caches (genkit/data/cache.py): bits.npy, the split bits of all shapes one after another; codes.npy, the bits of the codes, eight to a
byte; counts.npy [N, 2], how many of each a shape has; labels.npy, keys.json, captions.json, meta.json. It has its name when it is whole. While it is made, finished blocks
lie in a folder NAME.blocks, so that an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import files
from genkit.data.cache import Progress
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import DataInfo
from genkit.octree.tokens import OctreeTokens, grow, samples_of

_VERSION = 2  # of the files; raise it when they change
_BLOCK = 32  # shapes encoded together and kept when interrupted


class PackedShapes:
    """Tokens of shapes: {"ids" OctreeTokens, "label", "index" [B] int64, "key", "caption" list[str]}.

    Raises: UsageError when the folder is not a whole cache.
    """

    word = "ids"

    def __init__(self, *, path: str) -> None:
        self.path = folder = Path(path)
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            arrays = [
                np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("bits", "codes", "counts", "labels")
            ]
            self._bits, self._codes, counts, labels = arrays
            self._keys, self._captions = (
                json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("keys", "captions")
            )
            both = self.meta["dataset_fingerprint"] + self.meta["tokenizer_fingerprint"]
            names, shape = tuple(self.meta["class_names"]), tuple(self.meta["shape"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UsageError(
                f"{path} is not a whole cache of shapes ({error}); delete it and run `genkit cache` again"
            ) from None
        if not len(counts) == len(labels) == len(self._keys) or counts.sum(0).tolist() != [
            len(self._bits),
            len(self._codes),
        ]:
            raise UsageError(
                f"{path} is not a whole cache of shapes (lengths differ); delete it and run `genkit cache` again"
            )
        self._labels = torch.from_numpy(labels.astype(np.int64))
        self._ends = counts.astype(np.int64).cumsum(0)
        self._counts = counts.astype(np.int64)
        fingerprint = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()
        tokens = int(counts.sum() / max(1, len(counts)))
        self.info = DataInfo(shape, names, fingerprint, f"{path}: {len(self):,} shapes of {tokens:,} tokens on average")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        texts = {word: batch[word][0] for word in ("key", "caption")}
        return {"ids": batch["ids"], "label": int(batch["label"][0]), "index": index, **texts}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        index = np.asarray(indices, np.int64)
        per_shape = [self._of(int(i)) for i in index]
        return {
            "ids": joined(per_shape, self.meta["full_depth"], self.meta["code_depth"]),
            "label": self._labels[torch.from_numpy(index)],
            "index": torch.from_numpy(index),
            "key": [self._keys[i] for i in index.tolist()],
            "caption": [self._captions[i] for i in index.tolist()],
        }

    def _of(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        bits, codes = (
            torch.from_numpy(values[self._ends[i, k] - self._counts[i, k] : self._ends[i, k]].copy())
            for k, values in enumerate((self._bits, self._codes))
        )
        places = torch.arange(8)
        unpacked = (codes[:, :, None] >> places & 1).flatten(1)[:, : self.meta["bits"]]
        return bits.long(), unpacked.long()


def joined(shapes: list[tuple[torch.Tensor, torch.Tensor]], full_depth: int, depth: int) -> OctreeTokens:
    """Split bits [S_i] and codes [M_i, bits] of several shapes as one batch, depth by depth."""
    at = [0] * len(shapes)
    widths = [8**full_depth] * len(shapes)
    rows: list[torch.Tensor] = []
    for _ in range(full_depth, depth):
        for i, (bits, _) in enumerate(shapes):
            own = bits[at[i] : at[i] + widths[i]]
            at[i] += widths[i]
            widths[i] = 8 * int(own.sum())
            rows.append(own)
    splits = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    octree = grow(splits, full_depth=full_depth, depth=depth, batch_size=len(shapes))
    return OctreeTokens(octree, splits, torch.cat([codes for _, codes in shapes]))


def find_or_build(
    tokenizer: Any,
    dataset: Any,
    root: Path,
    *,
    name: str,
    tokenizer_fingerprint: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> PackedShapes:
    """The tokens of exactly this data and this tokenizer, from the folder root/name-HASH or made now."""
    both = f"{_VERSION} {dataset.info.fingerprint} {tokenizer_fingerprint}"
    out = Path(root) / f"{name}-{hashlib.blake2b(both.encode(), digest_size=6).hexdigest()}"
    if not (out / "meta.json").exists():
        _build(tokenizer, dataset, out, tokenizer_fingerprint, device, progress)
    return PackedShapes(path=str(out))


def _build(
    tokenizer: Any, dataset: Any, out: Path, tokenizer_fingerprint: str, device: Any, progress: Progress | None
) -> None:
    blocks = out.with_name(f"{out.name}.blocks")
    blocks.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(dataset), _BLOCK):
        part = blocks / f"{first:08d}.npz"
        last = min(first + _BLOCK, len(dataset))
        if not part.exists():
            batch = dataset.__getitems__(list(range(first, last)))
            if not len(batch["label"]):  # files that cannot be read are left out, and their dataset says which
                continue
            with torch.inference_mode():
                tokens = tokenizer.encode(batch["points"].to(device), batch["normals"].to(device)).to("cpu")
            texts = {f"{word}s": np.array(batch[word]) for word in ("key", "caption")}
            arrays = _packed(tokens) | {"labels": batch["label"].numpy(), **texts}
            temporary = part.with_suffix(".part.npz")
            np.savez(temporary, **arrays)
            temporary.rename(part)
        if progress is not None:
            progress(last, len(dataset))
    parts = [np.load(path, allow_pickle=False) for path in sorted(blocks.glob("[0-9]*[0-9].npz"))]
    if not parts:
        raise GenkitError(f"none of the {len(dataset)} shapes could be read: {dataset.info.source}")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name in ("bits", "codes", "counts", "labels"):
        np.save(temporary / f"{name}.npy", whole[name], allow_pickle=False)
    for name in ("keys", "captions"):
        files.write_json(temporary / f"{name}.json", whole[name].tolist())
    files.write_json(
        temporary / "meta.json",
        {
            "count": len(whole["keys"]),
            "shape": list(dataset.info.shape),
            "class_names": list(dataset.info.class_names),
            "grid": [1],  # tokens of a shape are no grid
            "stride": 1,
            "full_depth": tokenizer.full_depth,
            "code_depth": tokenizer.code_depth,
            "bits": tokenizer.bits,
            "tokens": int(whole["counts"].sum()),
            "source": dataset.info.source,
            "dataset_fingerprint": dataset.info.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        },
    )
    temporary.rename(out)
    shutil.rmtree(blocks)


def _packed(tokens: OctreeTokens) -> dict[str, np.ndarray]:
    """A batch shape after shape."""
    B, S = tokens.batch_size, len(tokens.splits)
    owner = samples_of(tokens.octree)
    of_splits, of_codes = owner[:S].argsort(stable=True), owner[S:].argsort(stable=True)
    bits = tokens.codes.shape[1]
    padded = torch.nn.functional.pad(tokens.codes, (0, -bits % 8)).unflatten(1, (-1, 8))
    bytes_ = (padded << torch.arange(8)).sum(2).to(torch.uint8)
    counts = torch.stack([torch.bincount(part, minlength=B) for part in (owner[:S], owner[S:])], 1)
    return {
        "bits": tokens.splits[of_splits].to(torch.uint8).numpy(),
        "codes": bytes_[of_codes].numpy(),
        "counts": counts.numpy(),
    }
