"""Classification sets of torchvision by name (CIFAR10, MNIST, SVHN, STL10, Flowers102, ...), already downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

from genkit.data.folder import prepare
from genkit.data.memory import InMemory, to_float
from genkit.errors import UsageError, nearest
from genkit.interfaces import DataInfo

# torchvision calls its splits differently from set to set: the first word a set accepts is taken.
SPLITS = {"train": ("train", "trainval"), "val": ("val", "test", "valid")}


class Torchvision:
    """x [C, Y, X] of the set's own size, or resized and centre-cropped to `size` (bicubic, antialiased).

    Sets that are one array (CIFAR, MNIST, SVHN, STL10) are held in memory; the others are decoded as they are read, and
    need `size`.

    Args:
        name: the class in torchvision.datasets, as written there.
        root: the folder given to torchvision's download.
        split: "val" is the set's validation split where it has one, else its test split.

    Raises: UsageError when torchvision or the set is not there; it says how to get it. Nothing is downloaded.
    """

    def __init__(
        self, *, name: str, root: str = "data", split: Literal["train", "val"] = "train", size: int | None = None
    ) -> None:
        dataset, word = _open(name, root, split)
        labels = np.asarray(_first(dataset, "targets", "labels", "_labels"), np.int64)
        names = getattr(dataset, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
        class_names = [str(n if isinstance(n, str) else ", ".join(n)) for n in names]
        keys = [f"{word}/{i:06d}" for i in range(len(labels))]
        source = f"torchvision {name} in {root}, {word}: {len(labels):,} images"
        self._memory: InMemory | None = None
        if hasattr(dataset, "data"):
            pixels = _resize(_channels_first(np.asarray(dataset.data)), size)
            self._memory = InMemory(pixels, labels, keys, class_names, source)
            self.info = self._memory.info
            return
        if size is None:
            raise UsageError(f"the images of {name} have many sizes; set data.size, for example data.size=64")
        self._dataset, self._labels, self._keys = dataset, labels, keys
        fingerprint = f"torchvision-{name}-{word}-{len(labels)}-{size}"
        self.info = DataInfo((3, size, size), tuple(class_names), fingerprint, source)

    def __len__(self) -> int:
        return len(self._memory) if self._memory is not None else len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"x" [C, Y, X] float32 in [-1, 1], "label" int, "index" int, "key" str}"""
        if self._memory is not None:
            return self._memory[index]
        pixels = prepare(self._dataset[index][0], (self.info.shape[1], self.info.shape[2]), 3)
        x = to_float(torch.from_numpy(np.ascontiguousarray(pixels)))
        return {"x": x, "label": int(self._labels[index]), "index": index, "key": self._keys[index]}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """{"x" [B, C, Y, X] float32 in [-1, 1], "label" [B] int64, "index" [B] int64, "key" list[str]}"""
        if self._memory is not None:
            return self._memory.__getitems__(indices)
        items = [self[int(index)] for index in indices]
        return {
            "x": torch.stack([item["x"] for item in items]),
            "label": torch.tensor([item["label"] for item in items]),
            "index": torch.as_tensor(indices, dtype=torch.int64),
            "key": [item["key"] for item in items],
        }


def _open(name: str, root: str, split: str) -> tuple[Any, str]:
    """The torchvision dataset and its own word for the split."""
    try:
        import torchvision
    except ImportError:
        raise UsageError("data.type=torchvision needs torchvision: pip install 'genkit-torch[data]'") from None
    known = [word for word in torchvision.datasets.__all__ if word[0].isupper()]
    if name not in known:
        raise UsageError(f"torchvision has no dataset {name}; {nearest(name, known)}")
    cls = getattr(torchvision.datasets, name)
    accepted = inspect.signature(cls).parameters
    if "download" not in accepted or not {"train", "split"} & set(accepted):
        raise UsageError(f"torchvision's {name} is not a set it downloads as train and test; use data.type=folder")
    choices: list[tuple[str, dict[str, Any]]]
    if "train" in accepted:
        choices = [("train" if split == "train" else "test", {"train": split == "train"})]
    else:
        choices = [(word, {"split": word}) for word in SPLITS[split]]
    reason: Exception | None = None
    for word, option in choices:
        try:
            return cls(root, download=False, **option), word
        except ValueError as error:  # a split this set does not have
            reason = error
        except (RuntimeError, OSError):
            ((key, value),) = option.items()
            call = f"torchvision.datasets.{name}({root!r}, {key}={value!r}, download=True)"
            raise UsageError(f'{name} ({word}) is not in {root}: python -c "import torchvision; {call}"') from None
    raise UsageError(f"torchvision's {name} has no split {split}: {reason}")


def _first(dataset: Any, *names: str) -> Any:
    for name in names:
        if hasattr(dataset, name):
            return getattr(dataset, name)
    raise UsageError(f"torchvision's {type(dataset).__name__} has no class labels; use data.type=folder")


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """[N, Y, X], [N, Y, X, 3] or [N, 3, Y, X] uint8 -> [N, C, Y, X]."""
    if pixels.ndim == 3:
        return pixels[:, None]
    return pixels if pixels.shape[1] in (1, 3) else pixels.transpose(0, 3, 1, 2)


def _resize(pixels: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or pixels.shape[-2:] == (size, size):
        return pixels
    chunks = torch.from_numpy(np.ascontiguousarray(pixels)).split(1024)  # bounds the memory of the resize
    return torch.cat([interpolate(chunk, (size, size), mode="bicubic", antialias=True) for chunk in chunks]).numpy()
