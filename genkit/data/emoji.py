"""Colour emoji: RGB images in 16 classes at any size, rendered from an installed Noto Color Emoji font."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genkit.data.memory import InMemory, InSizes
from genkit.data.sizes import Size, parse_size
from genkit.errors import UsageError

FONT_FILE = "NotoColorEmoji.ttf"
FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/noto",
    "/usr/share/fonts/google-noto-color-emoji-fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "/opt/homebrew/share/fonts",
    "C:/Windows/Fonts",
    "~/AppData/Local/Microsoft/Windows/Fonts",
)
FONT_SIZE = 109  # the only size of the bitmaps in the font
GLYPH = (136, 128)  # X, Y of a bitmap
SQUARE = 136
CANDIDATES = (range(0xA9, 0xAF), range(0x2030, 0x2C00), range(0x3030, 0x32A0), range(0x1F000, 0x1FB00))
VERSION = 1  # of what a cached rendering means; raise it when rendering changes
VAL_EVERY = 10  # every tenth image of a class is in the validation split

# Parts of other emoji (skin tones, hair, keycap), no pictures of their own.
PARTS = "20E3 1F3FB-1F3FF 1F9B0-1F9B3"

# Class -> code points. Our own grouping: Unicode's blocks follow the history of encoding, not what is in the picture,
# and its "flags" are sequences of two code points. A code point belongs to the first class that lists it, and to the
# last one if none does.
GROUPS = {
    "faces": (
        "2639-263A 1F479-1F47B 1F47D-1F480 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A "
        "1F9D0 1FAE0-1FAE5 1FAE8"
    ),
    "body": (
        "261D 270A-270D 1F440-1F450 1F463 1F485 1F4AA 1F590-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932-1F933 "
        "1F9B4-1F9B7 1F9BB 1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAE6 1FAF0-1FAF8"
    ),
    "people": (
        "26F7 26F9 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F 1F491 "
        "1F574-1F575 1F57A 1F5E3 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 1F930-1F931 "
        "1F934-1F93E 1F977 1F9B8-1F9B9 1F9CC-1F9CF 1F9D1-1F9DF 1FAC2-1FAC5"
    ),
    "animals": "1F400-1F43F 1F54A 1F577 1F648-1F64A 1F980-1F9AE 1FAB0-1FAB3 1FAB6 1FAB8 1FABC-1FABF 1FACE-1FACF",
    "plants": "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F384 1F38B 1F38D 1F490 1F4AE 1F940 1FAB4-1FAB5 1FAB7 1FABB",
    "food": "2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F942-1F944 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADB",
    "sky": (
        "2600-2604 2614 26A1 26C4-26C5 26C8 2744 2B50 1F300-1F301 1F308 1F30A 1F30C-1F320 1F324-1F32C 1F4A7-1F4A8 1FA90"
    ),
    "places": (
        "2668 26E9-26EA 26F0-26F2 26FA 1F303-1F307 1F309 1F30B 1F391 1F3A0-1F3A2 1F3AA 1F3D4-1F3ED 1F3EF-1F3F0 "
        "1F492 1F54B-1F54D 1F5FA-1F5FF 1F6D5-1F6D6 1F6DD"
    ),
    "transport": "2693 26F4-26F5 26FD 2708 1F3CD-1F3CE 1F680-1F6A8 1F6B2 1F6DE-1F6DF 1F6E2-1F6FC 1F9BC-1F9BD",
    "activities": (
        "26BD-26BE 26F3 26F8 1F004 1F0CF 1F380-1F381 1F383 1F386-1F390 1F396-1F3C9 1F3CF-1F3D3 1F3F8-1F3F9 1F52E "
        "1F579 1F93F 1F941 1F945-1F94F 1F9E8-1F9E9 1F9F8 1FA80-1FA88 1FA95 1FA97-1FA98 1FAA9"
    ),
    "clothing": (
        "26D1 1F302 1F392-1F393 1F451-1F462 1F484 1F48D-1F48E 1F576 1F6CD 1F97B-1F97F 1F9BA 1F9E2-1F9E6 "
        "1FA70-1FA74 1FA96"
    ),
    "clocks": "231A-231B 23F0-23F3 1F550-1F567 1F570",
    "hearts": "2665 2763-2764 1F48C 1F493-1F49F 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77",
    "shapes": "25AA-25FE 26AA-26AB 2B1B-2B1C 2B55 1F4A0 1F532-1F53D 1F7E0-1F7EB",
    "symbols": (
        "00A9-218F 2194-21AA 23CF 23E9-23EF 23F8-23FA 24C2 2611 2620-2638 2640-2660 2663 2666 267B-267F 2695 "
        "269B-26A0 26A7 26CE 26D4 2705 2714-2734 2747-2757 2795-3299 1F170-1F251 1F3A6 1F3E7 1F4A2 "
        "1F4A4-1F4A6 1F4AB-1F4AD 1F4AF 1F4B1-1F4B2 1F4F3-1F4F6 1F500-1F50A 1F515 1F517-1F524 1F52F-1F531 1F549 "
        "1F54E 1F5E8-1F5EF 1F6AB-1F6B1 1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0-1F6D1 1F6D7 1F6DC 1F7F0"
    ),
    "objects": "",
}

log = logging.getLogger("genkit.data")


class Emoji:
    """x [3, Y, X] on white, one image per single-code-point emoji of the font; keys are "1F600 grinning face".

    Rendered once per font and size, then read from $GENKIT_CACHE (default ~/.cache/genkit). A picture that is not square has the emoji in its middle, as
    large as the shorter side, white at both ends.

    Args:
        size: pixels per side, or (Y, X); resized from the font's 136-pixel bitmaps (bicubic, antialiased).
        sizes: several, "24x40" rows x columns: every emoji comes in each of them, and a batch holds several. `size` is then the square that sampling
            starts from, which need not be among them.
        font: path of NotoColorEmoji.ttf; None looks in the usual places of Linux, macOS and Windows, then asks
            fontconfig.
        split: "val" = every tenth image of a class, "train" = the others.

    Raises: UsageError without a font, or with one that holds no colour bitmaps.
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 32,
        sizes: list[str] | None = None,
        font: str | None = None,
        split: Literal["train", "val", "all"] = "all",
    ) -> None:
        nominal = parse_size(size, "data.size")
        wanted = [nominal] if sizes is None else [parse_size(text, "data.sizes") for text in sizes]
        if not wanted or len(set(wanted)) < len(wanted):
            raise UsageError(f"data.sizes={sizes} must name at least one size, and none twice")
        path = find_font(font)
        rendered = {side: _load_or_render(path, side) for side in sorted({min(size) for size in wanted})}
        code_points = next(iter(rendered.values()))[1]
        pixels = {size: _letterboxed(rendered[min(size)][0], size) for size in wanted}
        groups = {
            code_point: i for i, text in reversed(list(enumerate(GROUPS.values()))) for code_point in _expand(text)
        }
        labels = np.array([groups.get(code_point, len(GROUPS) - 1) for code_point in code_points.tolist()])
        if split != "all":
            rank = np.zeros(len(labels), np.int64)  # of each image within its class
            for label in range(len(GROUPS)):
                rank[labels == label] = np.arange((labels == label).sum())
            kept = (rank % VAL_EVERY == VAL_EVERY - 1) == (split == "val")
            pixels = {size: array[kept] for size, array in pixels.items()}
            code_points, labels = code_points[kept], labels[kept]
        # Python's table of names may be older than the font: such an emoji is known by its number.
        keys = [f"{cp:04X} {unicodedata.name(chr(cp), 'unnamed').lower()}" for cp in code_points.tolist()]
        source = f"{path}, {split}: {len(keys):,} emoji"
        self._images: InMemory | InSizes
        if sizes is None:
            self._images = InMemory(pixels[nominal], labels, keys, list(GROUPS), source)
            self.pixels = self._images.pixels
        else:
            told = f"{source} in {len(wanted)} sizes"
            self._images = InSizes(pixels, labels, keys, list(GROUPS), told, (3, *nominal))
            self.sizes = self._images.sizes
        self.info, self.keys, self.labels = self._images.info, self._images.keys, self._images.labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"x" [3, y, x] float32 in [-1, 1], "label" int, "index" int, "key" str}"""
        return self._images[index]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """{"x" [B, 3, Y, X] float32 in [-1, 1], "label" [B] int64, "index" [B] int64, "key" list[str]}; in several sizes "size" [B, 2] too, and x is
        padded with 0."""
        return self._images.__getitems__(indices)


def _letterboxed(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Squares [N, 3, side, side] in the middle of white pictures of `size`, whose shorter side is theirs."""
    (y, x), side = size, pixels.shape[-1]
    top, left = (y - side) // 2, (x - side) // 2
    around = ((0, 0), (0, 0), (top, y - side - top), (left, x - side - left))
    return np.pad(pixels, around, constant_values=255) if size != (side, side) else pixels


def find_font(font: str | None = None) -> Path:
    """Path of the emoji font. Raises UsageError that names the package to install."""
    if font is not None:
        path = Path(font).expanduser()
        if not path.is_file():
            raise UsageError(f"data.font={font}: no such file; leave it out or give the path of {FONT_FILE}")
        return path
    for folder in FONT_FOLDERS:
        path = Path(folder).expanduser() / FONT_FILE
        if path.is_file():
            return path
    if shutil.which("fc-list"):
        listed = subprocess.run(
            ["fc-list", ":family=Noto Color Emoji", "file"], capture_output=True, text=True, check=False
        )
        for line in listed.stdout.splitlines():
            path = Path(line.strip().rstrip(":"))
            if path.name == FONT_FILE:
                return path
    raise UsageError(f"no {FONT_FILE} found: apt install fonts-noto-color-emoji, or give its path as data.font")


def render(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every emoji of a font: pixels [N, 3, size, size] uint8 and code points [N] int64, rising."""
    try:
        # The plain layout engine: the other one substitutes sequences, and is not in every build of Pillow.
        font = ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UsageError(
            f"{path} has no {FONT_SIZE}-pixel colour bitmaps ({error}); "
            f"{FONT_FILE} of Debian's fonts-noto-color-emoji has"
        ) from None

    def draw(code_point: int) -> Image.Image:
        canvas = Image.new("RGBA", GLYPH, (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((0, 0), chr(code_point), font=font, embedded_color=True)
        return canvas

    missing = draw(0x10FFFD).tobytes()  # private use: whatever the font shows for what it lacks
    blank = Image.new("RGBA", GLYPH, (255, 255, 255, 0)).tobytes()
    parts = set(_expand(PARTS))
    images, found = [], []
    for code_point in (c for candidates in CANDIDATES for c in candidates if c not in parts):
        glyph = draw(code_point)
        if glyph.tobytes() in (missing, blank):
            continue
        square = Image.new("RGBA", (SQUARE, SQUARE), "white")
        square.alpha_composite(glyph, ((SQUARE - GLYPH[0]) // 2, (SQUARE - GLYPH[1]) // 2))
        images.append(np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
        found.append(code_point)
    if not found:
        raise UsageError(f"{path} draws no emoji; give the path of {FONT_FILE} as data.font")
    return np.stack(images).transpose(0, 3, 1, 2), np.array(found, np.int64)


def _load_or_render(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    root = Path(os.environ.get("GENKIT_CACHE") or "~/.cache/genkit").expanduser()
    cached = root / f"emoji-v{VERSION}-{size}-{digest}.npz"
    try:
        with np.load(cached, allow_pickle=False) as stored:
            return stored["pixels"], stored["code_points"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or not whole: rendering takes two seconds
    pixels, code_points = render(path, size)
    try:
        root.mkdir(parents=True, exist_ok=True)
        part = cached.with_name(f".{cached.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, pixels=pixels, code_points=code_points)
            file.flush()
            os.fsync(file.fileno())
        part.replace(cached)
    except OSError as error:
        log.warning(
            "the rendered emoji could not be kept in %s (%s); they are rendered again next time", root, error.strerror
        )
    return pixels, code_points


def _expand(text: str) -> list[int]:
    """ "2600-2602 2614" -> [0x2600, 0x2601, 0x2602, 0x2614]"""
    ends = [word.partition("-") for word in text.split()]
    return [code for first, _, last in ends for code in range(int(first, 16), int(last or first, 16) + 1)]
