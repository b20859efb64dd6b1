"""Inpainting, outpainting and editing with masked generators: an image and which of its pixels stay become a start with holes.

A token stays where all of its pixels do. Its pixels are put back into the result as they were; everything else is drawn.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from genkit import registry
from genkit.errors import UsageError

WORDS = ("left", "right", "top", "bottom", "center")


@dataclass(frozen=True)
class Known:
    """What is known of every sample."""

    start: Tensor  # ids [1, Q, *grid] with -1, or latents [1, C, *grid] with NaN, where something is to be found
    image: Tensor  # [1, C, Y, X] in [-1, 1]
    kept: Tensor  # [1, 1, Y, X] bool: pixels of tokens that stay
    record: dict[str, str]  # for the record of samples

    def paste(self, x: Tensor) -> Tensor:
        """Images [B, C, Y, X] with the kept pixels as they were."""
        return torch.where(self.kept.to(x.device), self.image.to(x), x)


def read(pipeline: Any, image: str | Path, keep: str, grid: tuple[int, ...] | None = None) -> Known:
    """The start of sampling from an image file.

    Args:
        pipeline: of a masked generator.
        keep: which pixels stay, see `mask_of`.
        grid: tokens per axis of the result; by default as trained.

    Raises: UsageError for a generator that cannot start from holes, an image or mask of another size, or a mask that keeps everything or no token.
    """
    from genkit.data.sizes import show_size

    word = pipeline.objective["type"]
    if not getattr(registry.find("objective", word), "fills_holes", False):
        able = [w for w in registry.words("objective") if getattr(registry.find("objective", w), "fills_holes", False)]
        raise UsageError(
            f"--known needs a masked generator (objective.type {', '.join(able)}); this one was trained with {word}"
        )
    tokenizer, grid = pipeline.tokenizer, pipeline.grid if grid is None else grid
    if len(grid) != 2:
        raise UsageError(
            f"--known needs a tokenizer whose tokens have places in the image; {type(tokenizer).__name__} has a row of {grid}"
        )
    size = [length * tokenizer.stride for length in grid]
    x = load_image(Path(image), tokenizer.image_channels)
    if list(x.shape[2:]) != size:
        raise UsageError(
            f"--known {image} has {show_size(x.shape[2:])} pixels, the generator draws {show_size(size)} (rows x columns); crop or resize it"
        )
    mask = mask_of(keep, (size[0], size[1]))
    cell = tokenizer.stride
    is_open = max_pool2d((~mask).float()[None, None], cell) > 0  # [1, 1, *grid]: some pixel is to be drawn
    if not bool(is_open.any()):
        raise UsageError(f"--keep {keep} keeps every token: nothing is left to draw")
    if bool(is_open.all()):
        raise UsageError(
            f"--keep {keep} keeps no token whole (a token is {cell}x{cell} pixels); keep more, or sample without --known"
        )
    with torch.no_grad():
        encoded = tokenizer.encode(x.to(pipeline.device))
    holes = is_open.to(pipeline.device)
    draws_ids = getattr(registry.find("objective", word), "target", "") == "ids"
    start = encoded.ids.masked_fill(holes, -1) if draws_ids else encoded.z.masked_fill(holes, torch.nan)
    kept = ~is_open.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    digest = hashlib.sha256(Path(image).read_bytes()).hexdigest()[:16]
    return Known(start, x, kept, {"image": str(image), "sha256": digest, "keep": keep})


def mask_of(keep: str, size: tuple[int, int]) -> Tensor:
    """[Y, X] bool, True = stays.

    Args:
        keep: "left", "right", "top", "bottom" (a half), "center" (half of each side), "Y0:Y1,X0:X1" in pixels; several joined by "+"; "not " before it
            for all others; or an image file, whose pixels above middle grey stay.
        size: (Y, X) of the image.

    Raises: UsageError for a word that is none of these, a box outside the image, or a mask file of another size.
    """
    text = keep.strip()
    if Path(text).is_file():
        from genkit.data.sizes import show_size

        grey = load_image(Path(text), 1)[0, 0]
        if grey.shape != size:
            raise UsageError(
                f"--keep {text} has {show_size(grey.shape)} pixels, the image {show_size(size)} (rows x columns)"
            )
        return grey > 0
    negated = text.startswith("not ")
    mask = torch.zeros(size, dtype=torch.bool)
    for part in text.removeprefix("not ").split("+"):
        rows, columns = _box(part.strip(), size, keep)
        mask[rows, columns] = True
    return ~mask if negated else mask


def _box(word: str, size: tuple[int, int], keep: str) -> tuple[slice, slice]:
    Y, X = size
    every = slice(None)
    named = {
        "left": (every, slice(0, X // 2)),
        "right": (every, slice(X // 2, X)),
        "top": (slice(0, Y // 2), every),
        "bottom": (slice(Y // 2, Y), every),
        "center": (slice(Y // 4, Y - Y // 4), slice(X // 4, X - X // 4)),
    }
    if word in named:
        return named[word]
    if match := re.fullmatch(r"(?:box\s+)?(\d+):(\d+)\s*,\s*(\d+):(\d+)", word):
        y0, y1, x0, x1 = map(int, match.groups())
        if y0 < y1 <= Y and x0 < x1 <= X:
            return slice(y0, y1), slice(x0, x1)
        raise UsageError(f"--keep {keep}: the box {word} does not lie in an image of {Y}x{X} pixels (rows x columns)")
    raise UsageError(
        f"--keep {keep}: {word!r} is neither a file nor a mask; write {', '.join(WORDS)}, a box Y0:Y1,X0:X1 in pixels, "
        "several joined by +, or 'not ' before them"
    )


def load_image(path: Path, channels: int) -> Tensor:
    """[1, channels, Y, X] in [-1, 1]; grey or colour as asked. Raises UsageError for a file that is no image."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = np.atleast_3d(np.asarray(picture.convert("L" if channels == 1 else "RGB")))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
