"""Sets of images on disk or in a dataset, read at their own size: what is evaluated, and what it is compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import registry
from genkit.errors import GenkitError, UsageError, nearest
from genkit.interfaces import Dataset
from genkit.metrics.statistics import read_npz

# Fashion-MNIST is found in different sizes on different machines; a reference must be the same everywhere.
_PINNED = {"fashion": {"source": "embedded"}}


@dataclass(frozen=True)
class Images:
    """Numbered images.

    Attributes:
        name: for people: "fashion train".
        sha: hash of what is in it, hex.
        read: (first, last) -> images [B, C, Y, X] in [-1, 1] and labels [B] int64 (-1 = none) of first .. last - 1.
            Images a dataset cannot decode are left out.
    """

    name: str
    sha: str
    shape: tuple[int, ...]
    count: int
    read: Callable[[int, int], tuple[Tensor, Tensor]]
    has_labels: bool = False
    notes: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        return f"{self.name}, n={self.count}, sha {self.sha[:8]}"


def from_spec(spec: dict[str, Any], split: str | None = None) -> Images:
    """A dataset by its config section, in another split if one is named. Raises UsageError when it has no such split."""
    if split is not None and spec.get("split") != split:
        if "split" in registry.options(registry.find("data", spec["type"])):
            spec = {**spec, "split": split}
        elif split != "train":
            raise UsageError(f"data.type={spec['type']} has no split '{split}'; name another reference")
    if "flip" in spec:
        spec = {**spec, "flip": False}
    return from_dataset(registry.build("data", spec), " ".join([spec["type"], spec.get("split") or ""]).strip())


def from_dataset(dataset: Dataset, name: str) -> Images:
    from genkit.data.loader import take

    def read(first: int, last: int) -> tuple[Tensor, Tensor]:
        batch = take(dataset, np.arange(first, last))
        return batch["x"], batch["label"]

    info = dataset.info
    return Images(name, info.fingerprint, tuple(info.shape), len(dataset), read, bool(info.class_names))


def from_folder(path: Path, class_names: tuple[str, ...] = ()) -> Images:
    """All images of a folder and below, at their own size; all must have the same. 16-bit, transparent and CMYK files become 8-bit grey or RGB.

    Labels are read from samples.json, which `genkit sample` writes beside its images; else they are the names of first-level subfolders, numbers or
    words of `class_names`. Pictures called grid* are overviews, not samples, and are left out.

    Raises: UsageError without images; GenkitError for an unreadable file or one of another size, which is named.
    """
    from PIL import Image

    from genkit.data.folder import GREY_MODES, describe, prepare, scan

    every = scan(str(path))
    files = [file for file in every if not Path(file).name.startswith("grid")]
    if not files:
        raise UsageError(f"{path} has no images besides {every[0]}")

    def decode(file: str, channels: int | None = None) -> np.ndarray:
        try:
            with Image.open(path / file) as image:
                return prepare(image, None, channels or (1 if image.mode in GREY_MODES else 3))
        except Exception as error:  # decoders raise many unrelated types on broken bytes
            raise GenkitError(
                f"{path / file} cannot be decoded: {describe(error, path / file)}; repair or remove it"
            ) from None

    shape = decode(files[0]).shape
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.encode("utf-8", "surrogateescape") + b"\0" + (path / file).read_bytes())
    labels = torch.tensor(_labels(path, files, class_names), dtype=torch.int64)

    def read(first: int, last: int) -> tuple[Tensor, Tensor]:
        arrays = []
        for file in files[first:last]:
            array = decode(file, shape[0])
            if array.shape != shape:
                raise GenkitError(
                    f"{path} mixes sizes: {files[0]} is {_by(shape)}, {file} is {_by(array.shape)} (CxYxX); all must have the same"
                )
            arrays.append(array)
        return _scaled(torch.from_numpy(np.stack(arrays))), labels[first:last]

    skipped = (f"pictures called grid*, left out: {len(every) - len(files)}",) if len(files) < len(every) else ()
    return Images(
        f"folder {path.name}", digest.hexdigest(), shape, len(files), read, bool((labels >= 0).all()), skipped
    )


def from_npz(path: Path) -> Images:
    """`arr_0` uint8 [N, Y, X, C] or [N, C, Y, X] or [N, Y, X], and, where it is there, `arr_1` or `label` [N].

    Raises: GenkitError for another content, naming the keys that were found.
    """
    arrays = read_npz(path)
    found = ", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in arrays.items()) or "nothing"
    if "arr_0" not in arrays:
        raise GenkitError(f"{path} has no arr_0 (images, uint8 [N, Y, X, C] or [N, C, Y, X]); found {found}")
    pixels = arrays["arr_0"]
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 4
        or not {pixels.shape[-1], pixels.shape[1]} & {1, 3}
        or not len(pixels)
    ):
        raise GenkitError(
            f"{path}: arr_0 must be uint8 [N, Y, X, C] or [N, C, Y, X] with 1 or 3 channels; found {found}"
        )
    if pixels.shape[-1] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    named = arrays.get("arr_1", arrays.get("label"))
    labels = torch.full((len(pixels),), -1) if named is None else torch.from_numpy(named.astype(np.int64))
    if labels.shape != (len(pixels),):
        raise GenkitError(f"{path}: {len(pixels)} images but labels of shape {list(labels.shape)}")
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)

    def read(first: int, last: int) -> tuple[Tensor, Tensor]:
        return _scaled(torch.from_numpy(np.ascontiguousarray(pixels[first:last]))), labels[first:last]

    return Images(path.name, digest.hexdigest(), pixels.shape[1:], len(pixels), read, named is not None)


def find(word: str, data: dict[str, Any] | None = None) -> Images:
    """A reference: "train" or "val" of the data section `data`, a folder, an npz of images, or a dataset word ("fashion", "fashion:val").

    Raises: UsageError when it is none of them.
    """
    if word in ("train", "val"):
        if data is None:
            raise UsageError(
                f"reference={word} means a split of a run's own data, and there is no run here; name a dataset, a folder or an npz"
            )
        return from_spec(data, word)
    path = Path(word)
    if path.suffix == ".npz":
        return from_npz(path)
    if path.is_dir():
        return from_folder(path)
    name, _, split = word.partition(":")
    known = list(registry.words("data"))
    if name not in known:
        raise UsageError(f"reference={word} is neither a folder, an npz nor a dataset; {nearest(name, known)}")
    spec = registry.check("data", {"type": name, **_PINNED.get(name, {})}, "reference")
    return from_spec(spec, split or "train")


def _labels(path: Path, files: list[str], class_names: tuple[str, ...]) -> list[int]:
    """One label per file, -1 where there is none."""
    record = path / "samples.json"
    if record.is_file():
        try:
            by_file = {
                row["file"]: int(row["label"]) for row in json.loads(record.read_text(encoding="utf-8"))["samples"]
            }
        except (ValueError, KeyError, TypeError) as error:
            raise GenkitError(
                f"{record} is not the list of samples `genkit sample` writes ({error!r}); remove it"
            ) from None
        return [by_file.get(file, -1) for file in files]
    by_name = {name.lower(): i for i, name in enumerate(class_names)}
    tops = [file.partition("/")[0] if "/" in file else "" for file in files]
    return [int(top) if top.isdigit() else by_name.get(top.lower(), -1) for top in tops]


def _scaled(pixels: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
