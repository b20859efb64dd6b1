"""Images by the words of people: a folder, a zip, an npz, a dataset, a split of a run's own data; what is evaluated, and what it is compared with."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from genkit import registry
from genkit.data.sizes import Size, parse_size, show_size
from genkit.errors import UsageError, nearest
from genkit.interfaces import Dataset
from genkit.metrics.image_arrays import from_npz
from genkit.metrics.image_files import from_folder, from_zip
from genkit.metrics.image_set import Images

# Fashion-MNIST is found in different sizes on different machines; a reference must be the same everywhere.
_PINNED = {"fashion": {"source": "embedded"}}


def find(word: str, data: dict[str, Any] | None = None, option: str = "reference") -> Images:
    """Images by what a person names them: "train" or "val" of the data section `data`, a folder, a zip, an npz of images, or a dataset word
    ("fashion", "fashion:val"). A file of statistics is read by genkit.metrics.references.

    Args:
        option: what was named, for messages.

    Raises: UsageError when it is none of them.
    """
    if word in ("train", "val"):
        if data is None:
            raise UsageError(
                f"{option}={word} means a split of a run's own data, and there is no run here; name a dataset, a folder, a zip or an npz"
            )
        return from_spec(data, word)
    path = Path(word)
    if path.suffix.lower() == ".npz":
        return from_npz(path)
    if path.suffix.lower() == ".zip":
        return from_zip(path)
    if path.is_dir():
        return from_folder(path)
    name, _, split = word.partition(":")
    known = list(registry.words("data"))
    if name not in known:
        raise UsageError(
            f"{option}={word} is neither a folder, a zip or npz of images, nor a dataset (fashion, fashion:val), nor train or val of a run; "
            f"{nearest(name, known)}"
        )
    spec = registry.check("data", {"type": name, **_PINNED.get(name, {})}, option)
    return from_spec(spec, split or "train")


def from_spec(spec: dict[str, Any], split: str | None = None) -> Images:
    """A dataset by its config section, in another split if one is named. Raises UsageError when it has no such split."""
    if split is not None and spec.get("split") != split:
        if "split" in registry.options(registry.find("data", spec["type"])):
            spec = registry.check("data", {**spec, "split": split}, "data")
        elif split != "train":
            raise UsageError(f"data.type={spec['type']} has no split '{split}'; name another reference")
    if spec["type"] == "tokens":
        raise UsageError(
            f"data.path={spec['path']} holds latents and no images; name what to compare with: --ref FOLDER, or --ref with a dataset's word"
        )
    if "flip" in spec:
        spec = {**spec, "flip": False}
    if spec.get("sizes") or spec.get("aspect", "crop") != "crop":
        sides = spec["size"]
        spec = at_size(spec, parse_size(sides))
    return from_dataset(registry.build("data", spec), " ".join([spec["type"], spec.get("split") or ""]).strip())


def at_size(spec: dict[str, Any], size: Size) -> dict[str, Any]:
    """The config section of the same images, all at one size. Raises UsageError for data that come in their own size alone."""
    options = registry.options(registry.find("data", spec["type"]))
    kinds = typing.get_args(options["size"].annotation) if "size" in options else ()
    if not any(typing.get_origin(kind) is tuple for kind in kinds) and size[0] != size[1]:
        raise UsageError(
            f"data.type={spec['type']} has no images of {show_size(size)} to compare with; name others, --ref FOLDER, or a square size"
        )
    changed: dict[str, Any] = {"size": list(size) if size[0] != size[1] else size[0]}
    changed |= {name: value for name, value in {"aspect": "crop", "sizes": None}.items() if name in options}
    return registry.check("data", {**spec, **changed}, "data")


def from_dataset(dataset: Dataset, name: str) -> Images:
    return _Dataset(dataset, name)


class _Dataset(Images):
    def __init__(self, dataset: Dataset, name: str):
        from genkit.data.folder import Folder

        info = dataset.info
        super().__init__(name, tuple(info.shape), len(dataset), bool(info.class_names))
        self.dataset = dataset
        self.is_exact = not isinstance(dataset, Folder)  # whose fingerprint is that of names and file sizes

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        from genkit.data.loader import take

        batch = take(self.dataset, np.asarray(numbers, np.int64))
        if len(batch["x"]) < len(numbers):
            keys = getattr(self.dataset, "keys", None)
            for number in set(numbers) - set(batch["index"].tolist()):
                self.missing[number] = str(number if keys is None else keys[number])
        return batch["x"], batch["label"]

    def _hash(self) -> str:
        return self.dataset.info.fingerprint
