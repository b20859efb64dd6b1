"""A folder of images of any kind and size: class = first-level subfolder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info

from genkit.data.memory import to_float
from genkit.data.sizes import Size, pad_batch, within_budget
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import DataInfo
from genkit.rng import Rng

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
PROBED = 64  # headers read to decide between grey and colour: a folder of millions must open in seconds

log = logging.getLogger("genkit.data")


class Folder:
    """x [C, Y, X]: the largest centred part of each image with the shape of `size`, resized (bicubic, antialiased); or each in a size of its own.

    Files are found recursively, hidden ones left out; keys are paths relative to `path`. Files directly in `path` have
    label -1, and without subfolders nothing is labelled. Pixels become 8-bit grey or RGB: EXIF orientation is applied,
    transparency (RGBA, LA, palettes) is laid over white, 16-bit grey is divided by 257 (integer modes wider than that
    are clipped to 16 bits first), 16-bit colour keeps its high byte (Pillow), CMYK and the like go through RGB, grey
    from colour is ITU-R 601 luma, of an animation the first frame counts. 32-bit float images have no stated range and
    count as corrupt.

    A corrupt file never stops a run: `fetch` puts the next good file in its place, `__getitems__` leaves it out, and
    `skipped` tells each by name.

    Args:
        size: pixels per side, or (Y, X).
        aspect: "crop" brings all images to `size`. "keep" keeps their aspect ratios: at most as many pixels as `size` has, larger images shrunk to that,
            smaller ones left as they are, sides rounded down to multiples of `unit` (as FiT). "both": the same images once more, cropped, as odd numbers;
            those that are not larger than `size` along both sides come as they are twice (as FiTv2, which draws one of the two each time).
        unit: pixels, for "keep" and "both": the tokenizer's stride times the backbone's patch, 16 in FiT.
        channels: "auto" = 1 when all of up to 64 files spread over the folder are grey, else 3.
        val_fraction: share of every class that forms the split "val", chosen by a hash of the file's name; "train" is
            the rest.
        flip: mirror left-right at random, in `fetch` only.

    Raises: UsageError for a path that is missing, not a folder, or without images, and for a split that would be empty.
    """

    def __init__(
        self,
        *,
        path: str,
        size: int | tuple[int, int],
        aspect: Literal["crop", "keep", "both"] = "crop",
        unit: int = 16,
        channels: Literal["auto", 1, 3] = "auto",
        split: Literal["train", "val", "all"] = "all",
        val_fraction: float = 0.0,
        flip: bool = False,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1:
            raise UsageError(f"data.size={size} must be positive")
        self.aspect, self.unit = aspect, unit
        if aspect != "crop" and (unit < 1 or any(side % unit for side in self.size)):
            raise UsageError(
                f"data.size={size} must be a multiple of data.unit={unit}, the stride times the patch size"
            )
        if not 0 <= val_fraction < 1:
            raise UsageError(f"data.val_fraction={val_fraction} must be at least 0 and below 1")
        if split == "val" and val_fraction == 0:
            raise UsageError("data.split=val needs data.val_fraction above 0, for example 0.1")
        self.path, self.flip = Path(path), flip
        files = scan(path)
        classes = sorted({top for top in map(_top, files) if top})
        if split != "all":
            in_val = choose_val(files, val_fraction)
            files = [file for file in files if (file in in_val) == (split == "val")]
            if not files:
                raise UsageError(f"data.val_fraction={val_fraction} leaves no image of {path} in the split {split}")
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number.get(_top(file), -1) for file in files], np.int64)
        self._times = 2 if aspect == "both" else 1  # how often each file comes
        self.keys = [file for file in files for _ in range(self._times)]
        self.labels = labels.repeat(self._times)
        self.channels = _probe_channels(self.path, files) if channels == "auto" else int(channels)
        self.skipped: dict[str, str] = {}  # key -> reason; every corrupt file met so far, here or in a loader's workers
        self._unsent: dict[str, str] = {}  # what the next batch tells the process that asked for it

        how = (self.size, self.channels, classes, *(() if aspect == "crop" else (aspect, unit)))
        digest = hashlib.blake2b(repr(how).encode(), digest_size=16)
        for file in files:
            digest.update(f"{file}\0{(self.path / file).stat().st_size}\0".encode("utf-8", "surrogateescape"))
        labelled = f"{len(classes)} classes" if classes else "unlabelled"
        source = f"{path}, {split}: {len(files):,} images, {labelled}"
        self.info = DataInfo(
            (self.channels, *self.size), tuple(classes), digest.hexdigest(), source, 0 if aspect == "crop" else unit
        )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sizes(self) -> np.ndarray:
        """[N, 2] int64: every sample's own size, read from the heads of the files; 0 of one that cannot be read."""
        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            found = list(pool.map(self._size_of, range(len(self))))
        return np.array(found, np.int64).reshape(-1, 2)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"x" [C, Y, X] float32 in [-1, 1], "label" int, "index" int, "key" str}; GenkitError if corrupt."""
        pixels = self._read(index)
        if pixels is None:
            key = self.keys[index]
            raise GenkitError(f"{self.path / key} cannot be decoded: {self.skipped[key]}")
        x = to_float(torch.from_numpy(pixels))
        return {"x": x, "label": int(self.labels[index]), "index": index, "key": self.keys[index]}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The samples that can be decoded, in order, as a batch; see `fetch` for its parts."""
        read = [(int(index), self._read(int(index))) for index in indices]
        return self._batch([(index, pixels) for index, pixels in read if pixels is not None], None)

    def fetch(self, indices: Sequence[int] | np.ndarray, rng: Rng) -> dict[str, Any]:
        """One sample per index; a corrupt file is replaced by the next good one in order, mostly of the same class.

        Args:
            rng: one stream per sample; decides the flips.

        Returns: {"x" [B, C, Y, X] float32 in [-1, 1], "label" [B] int64, "index" [B] int64, "key" list[str]} of the
            samples really taken, and "skipped" {key: reason} if a corrupt file was met for the first time. Images in sizes of their own are padded
            with 0, and have "size" [B, 2].

        Raises: GenkitError when no file can be decoded.
        """
        mirrored = rng.fork("flip").uniform() < 0.5 if self.flip else None  # [B]
        return self._batch([self._read_good(int(index)) for index in indices], mirrored)

    def note(self, skipped: dict[str, str]) -> None:
        """Remember corrupt files, and name each once. A loader calls it with what its workers met."""
        for key, reason in skipped.items():
            if key not in self.skipped:
                self.skipped[key] = reason
                if get_worker_info() is None:
                    log.warning("skipped %s (%s); %d corrupt so far", self.path / key, reason, len(self.skipped))

    def _batch(self, read: list[tuple[int, np.ndarray]], mirrored: Tensor | None) -> dict[str, Any]:
        index = np.array([i for i, _ in read], np.int64)
        images = [to_float(torch.from_numpy(pixels)) for _, pixels in read]
        if mirrored is not None:
            images = [x.flip(-1) if turn else x for x, turn in zip(images, mirrored.tolist(), strict=True)]
        x, size = pad_batch(images) if images else (torch.empty(0, *self.info.shape), torch.empty(0, 2).long())
        batch: dict[str, Any] = {
            "x": x,
            **({"size": size} if self.info.unit else {}),
            "label": torch.from_numpy(self.labels[index]),
            "index": torch.from_numpy(index),
            "key": [self.keys[i] for i in index],
        }
        unsent, self._unsent = self._unsent, {}
        return batch | ({"skipped": unsent} if unsent else {})

    def _read(self, index: int) -> np.ndarray | None:
        """[C, Y, X] uint8, or None for a corrupt file, which is noted."""
        key = self.keys[index]
        if key in self.skipped:
            return None
        try:
            with Image.open(self.path / key) as image:
                if self.aspect == "crop":
                    return prepare(image, self.size, self.channels)
                picture = converted(image, self.channels)
                size, is_crop = self._target(index, (picture.height, picture.width))
                return to_array(resized(picture, size, is_crop))
        except Exception as error:  # Pillow's decoders raise a dozen unrelated types on broken bytes
            self._unsent[key] = describe(error, self.path / key)
            self.note(self._unsent)
            return None

    def _read_good(self, index: int) -> tuple[int, np.ndarray]:
        # Where sizes are known, batches may be of one size, and what stands in must not spoil that.
        sizes = self.__dict__.get("sizes")
        for candidate in (*range(index, len(self)), *range(index)):
            if sizes is not None and (sizes[candidate] != sizes[index]).any():
                continue
            pixels = self._read(candidate)
            if pixels is not None:
                return candidate, pixels
        raise GenkitError(
            f"none of the {len(self)} images of {self.path} can be decoded; run: genkit data check {self.path}"
        )

    def _size_of(self, index: int) -> Size:
        try:
            with Image.open(self.path / self.keys[index]) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                size = (image.width, image.height) if turned else (image.height, image.width)
        except Exception:  # as in _read
            return 0, 0
        return self._target(index, size)[0]

    def _target(self, index: int, size: Size) -> tuple[Size, bool]:
        """The size an image of `size` comes in, and whether it is cropped to that; else it is stretched by the little that rounding asks for."""
        is_larger = size[0] > self.size[0] and size[1] > self.size[1]
        if self.aspect == "crop" or (index % self._times == 1 and is_larger):
            return self.size, True
        return within_budget(size, self.size[0] * self.size[1], self.unit), False


def describe(error: Exception, path: Path) -> str:
    """Why a file could not be decoded, on one line and without its own path."""
    if path.exists() and path.stat().st_size == 0:
        return "empty file"
    text = " ".join(str(error).split()).replace(f" {str(path)!r}", "")
    return text or type(error).__name__


def prepare(image: Image.Image, size: Size | None, channels: int) -> np.ndarray:
    """[C, Y, X] uint8 of an opened image, converted as `Folder` says and cropped to a size. size None = as it is."""
    picture = converted(image, channels)
    return to_array(picture if size is None else resized(picture, size, is_crop=True))


def converted(image: Image.Image, channels: int) -> Image.Image:
    """8-bit grey or RGB, the right way up, as `Folder` says."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no stated range; save them as 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return image.convert("L" if channels == 1 else "RGB")


def resized(image: Image.Image, size: Size, is_crop: bool) -> Image.Image:
    """The largest centred part of that shape, or the whole image, at a size (bicubic, antialiased)."""
    sides = (size[1], size[0])
    if is_crop:
        return ImageOps.fit(image, sides, Image.Resampling.BICUBIC)
    return image if image.size == sides else image.resize(sides, Image.Resampling.BICUBIC)


def to_array(image: Image.Image) -> np.ndarray:
    """[C, Y, X] uint8 of an image in grey or RGB."""
    pixels = np.array(image)
    return pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)


def scan(path: str) -> list[str]:
    """Paths of all images below a folder, relative to it, in one fixed order; UsageError when there are none."""
    root = Path(path)
    if not root.exists():
        raise UsageError(f"no such folder: {path}")
    if not root.is_dir():
        raise UsageError(f"{path} is a file; data.path must be a folder")

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be listed: {error.strerror}")

    found = []
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        here = os.path.realpath(folder)
        # A link to a folder above itself would be walked for ever.
        below[:] = [
            name
            for name in below
            if not name.startswith(".")
            and not f"{here}/".startswith(f"{os.path.realpath(os.path.join(folder, name))}/")
        ]
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not found:
        raise UsageError(f"{path} has no images; looked for {', '.join(EXTENSIONS)} in it and below")
    return sorted(found)


def _top(file: str) -> str:
    """The class of a relative path; empty for a file that lies directly in the folder."""
    return file.partition("/")[0] if "/" in file else ""


def choose_val(files: list[str], fraction: float) -> set[str]:
    """The same share of every class, by a hash of the name: it does not follow any order the files were numbered in."""
    ranked: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).hexdigest()
        ranked.setdefault(_top(file), []).append((digest, file))
    return {file for members in ranked.values() for _, file in sorted(members)[: round(fraction * len(members))]}


def _probe_channels(root: Path, files: list[str]) -> int:
    """1 when every probed header is grey; unreadable files have no say."""
    modes = []
    for i in range(0, len(files), max(1, len(files) // PROBED)):
        try:
            with Image.open(root / files[i]) as image:
                modes.append(image.mode)
        except Exception:
            continue
    return 1 if modes and all(mode in GREY_MODES for mode in modes) else 3
