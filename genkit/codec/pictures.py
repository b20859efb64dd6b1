"""Image files to the pixels a tokenizer takes, each in its own size, and names to write under."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from genkit.data.folder import EXTENSIONS, describe, prepare
from genkit.errors import UsageError


@dataclass(frozen=True)
class Picture:
    """name; size (Y, X) before padding; pixels [C, Y, X] uint8, padded."""

    name: str
    size: tuple[int, int]
    pixels: NDArray[np.uint8]


def read(
    folder: Path,
    keys: Sequence[str],
    *,
    channels: int,
    multiple: int,
    size: tuple[int, int] | None,
    pad: bool,
    skipped: dict[str, str],
) -> Iterator[Picture]:
    """The images of a folder that can be read, in order. Corrupt ones go to `skipped`, name -> reason.

    Args:
        channels: 1 or 3. Grey images become colour; colour does not become grey.
        multiple: of what the sides have to be.
        size: crop and resize to (Y, X); None = as they are.
        pad: reflect at the right and lower edge up to the next multiple.

    Raises: UsageError for an image in colour where grey is needed, or with sides that do not fit.
    """
    for key in keys:
        try:
            with Image.open(folder / key) as image:
                pixels = prepare(image, size, 3)
        except Exception as error:  # Pillow's decoders raise a dozen unrelated types on broken bytes
            skipped[key] = describe(error, folder / key)
            continue
        if channels == 1:
            if not (pixels == pixels[:1]).all():
                raise UsageError(
                    f"{key} is in colour, but the tokenizer was trained on grey images; convert it first, or use a tokenizer of colour"
                )
            pixels = pixels[:1]
        Y, X = pixels.shape[1:]
        missing = (-Y % multiple, -X % multiple)
        if any(missing) and not pad:
            smaller, larger = (Y // multiple * multiple, X // multiple * multiple), (Y + missing[0], X + missing[1])
            fits = " or ".join(f"{y}x{x}" for y, x in (smaller, larger) if y and x)
            raise UsageError(
                f"{key} is {Y}x{X}, but sides must be multiples of the tokenizer's stride, {multiple} (nearest that fit: {fits}); "
                "--pad extends images and crops them after decoding, --fit resizes them to the size of its training"
            )
        yield Picture(key, (Y, X), np.pad(pixels, [(0, 0), (0, missing[0]), (0, missing[1])], "reflect"))


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """The folder itself, or for the length of the block a folder that holds one file."""
    if not path.is_file():
        yield path
        return
    if path.suffix.lower() not in EXTENSIONS:
        raise UsageError(f"{path} is no image; known: {', '.join(EXTENSIONS)}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def file_names(names: Sequence[str]) -> list[str]:
    """PNG names, one for each image; a codes file from elsewhere cannot name a path outside the output folder."""
    taken: set[str] = set()
    chosen = []
    for name in names:
        parts = [part for part in PurePosixPath(name).parts if part not in ("..", "/")]
        parts[-1:] = [PurePosixPath(part).stem for part in parts[-1:]]
        stem = "/".join(re.sub(r"[^\w.\- ]", "_", part)[:100] for part in parts[:16]) or "image"
        number, unique = 1, stem
        while unique in taken:
            number += 1
            unique = f"{stem}-{number}"
        taken.add(unique)
        chosen.append(f"{unique}.png")
    return chosen
