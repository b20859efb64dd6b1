"""Fashion-MNIST: 28x28 grey pictures of clothes in 10 classes (Xiao et al. 2017, arXiv:1708.07747).

The 10,000 images of its test split ship with genkit, so that everything runs without a download; the full 70,000 are
used where they are found.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from genkit.data.memory import InMemory
from genkit.errors import UsageError

CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
EMBEDDED = Path(__file__).parent / "embedded"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TRAIN_OF_EMBEDDED = 9_000  # of 10,000; the rest is the validation split


class Fashion(InMemory):
    """x [1, Y, X] with Y = X = size or 28, background -1.

    Args:
        source: "embedded" = the 10,000 images in the package (train: the first 9,000, val: the last 1,000); "full" =
            the 70,000 of the Debian package dataset-fashion-mnist or of a torchvision download under $GENKIT_DATA or
            ./data (train: 60,000, val: 10,000); "auto" = full where it is found, else embedded. `info.source` says
            which it was.
        size: pixels per side; pads 28 with background, the odd pixel at the bottom and right.

    Raises: UsageError when the full set is asked for and not there, or size < 28.
    """

    def __init__(
        self,
        *,
        source: Literal["auto", "embedded", "full"] = "auto",
        split: Literal["train", "val", "all"] = "train",
        size: int | None = None,
    ) -> None:
        if size is not None and size < 28:
            raise UsageError(f"data.size={size} is smaller than the 28x28 images of fashion; leave it out or use 32")
        folder = EMBEDDED if source == "embedded" else _find_full()
        if folder is None and source == "full":
            raise UsageError(
                "the full Fashion-MNIST was not found: apt install dataset-fashion-mnist, or "
                "python -c \"import torchvision; torchvision.datasets.FashionMNIST('data', download=True)\""
            )
        folder = folder or EMBEDDED
        if folder == EMBEDDED:
            parts = [
                (
                    "t10k",
                    *{"train": (0, TRAIN_OF_EMBEDDED), "val": (TRAIN_OF_EMBEDDED, 10_000), "all": (0, 10_000)}[split],
                )
            ]
            where = "the Fashion-MNIST test split in the package"
        else:
            parts = [("train", 0, 60_000)] * (split != "val") + [("t10k", 0, 10_000)] * (split != "train")
            where = f"the full Fashion-MNIST in {folder}"
        pixels = np.concatenate([_read(folder, f"{name}-images-idx3-ubyte")[first:last] for name, first, last in parts])
        labels = np.concatenate([_read(folder, f"{name}-labels-idx1-ubyte")[first:last] for name, first, last in parts])
        keys = [f"{name}/{i:05d}" for name, first, last in parts for i in range(first, last)]
        if size is not None:
            before, after = (size - 28) // 2, (size - 28 + 1) // 2
            pixels = np.pad(pixels, ((0, 0), (before, after), (before, after)))
        super().__init__(pixels[:, None], labels, keys, CLASS_NAMES, f"{where}, {split}: {len(pixels):,} images")


def _path(folder: Path, name: str) -> Path | None:
    """torchvision leaves both the packed and the unpacked file, Debian only the packed one."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _find_full() -> Path | None:
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    root = Path(os.environ.get("GENKIT_DATA", "data"))
    folders = (root / "FashionMNIST" / "raw", DEBIAN)
    return next((folder for folder in folders if all(_path(folder, name) for name in names)), None)


def _read(folder: Path, name: str) -> np.ndarray:
    """One file of the IDX format: a big-endian header (0, 0, type, axes, sizes...), then the bytes."""
    path = _path(folder, name)
    if path is None:
        raise UsageError(f"{folder} has no {name}.gz; reinstall genkit")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, axes = struct.unpack(">xxBB", data[:4])
        shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
        if kind != 8:  # unsigned bytes
            raise ValueError(f"element type {kind}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UsageError(f"{path} is not a readable IDX file ({error}); delete it and download it again") from None
