"""What is in a folder of images: every file decoded once, nothing written."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from genkit.data.folder import describe, scan

WORDS = ("fashion", "emoji")
SHOWN = 20  # files named on the screen; the report itself names all


class _Image(NamedTuple):
    key: str
    label: str  # empty = unlabelled
    size: tuple[int, int] = (0, 0)  # Y, X as displayed (EXIF orientation applied)
    mode: str = ""
    format: str = ""
    digest: bytes = b""
    problem: str = ""  # why it cannot be decoded


def report(path: str) -> dict[str, Any]:
    """Decode everything below a folder, or in one of the built-in sets `fashion` and `emoji`.

    Returns plain data, ready for JSON: "path", "files", "good", "classes" {name: good files} in order of name,
    "unlabelled", "sizes" {"min", "median", "max": [Y, X] per axis, "most_common": [[Y, X], count] x 5}, "modes" and
    "formats" {word: count}, "corrupt" [{"key", "reason"}], "duplicates" [[key, ...]] of equal pixels.

    Raises: UsageError for a path that is missing, not a folder, or without images.
    """
    found = list(_read_set(path) if path in WORDS and not os.path.isdir(path) else _read_folder(path))
    good = [image for image in found if not image.problem]
    same: dict[bytes, list[str]] = defaultdict(list)
    for image in good:
        same[image.digest].append(image.key)
    sizes: dict[str, Any] = {}
    if good:
        ys, xs = sorted(image.size[0] for image in good), sorted(image.size[1] for image in good)
        sizes = {word: [ys[i], xs[i]] for word, i in (("min", 0), ("median", len(good) // 2), ("max", -1))}
        sizes["most_common"] = [[list(size), n] for size, n in Counter(image.size for image in good).most_common(5)]
    classes = Counter({image.label: 0 for image in found if image.label})
    classes.update(image.label for image in good if image.label)
    return {
        "path": path,
        "files": len(found),
        "good": len(good),
        "classes": dict(sorted(classes.items())),
        "unlabelled": sum(not image.label for image in good),
        "sizes": sizes,
        "modes": dict(Counter(image.mode for image in good).most_common()),
        "formats": dict(Counter(image.format for image in good).most_common()),
        "corrupt": [{"key": image.key, "reason": image.problem} for image in found if image.problem],
        "duplicates": [keys for keys in same.values() if len(keys) > 1],
    }


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['path']}: {report['good']:,} good images of {report['files']:,} files"]
    classes = report["classes"]
    if classes:
        smallest, largest = min(classes.values()), max(classes.values())
        lines.append(f"classes    {len(classes)}, {smallest:,} to {largest:,} images each")
        lines += [f"           {count:>8,}  {name}" for name, count in classes.items()]
    if report["unlabelled"]:
        lines.append(f"unlabelled {report['unlabelled']:,}")
    if report["sizes"]:
        sizes = report["sizes"]
        lines.append("size (YxX) " + ", ".join(f"{word} {_by(sizes[word])}" for word in ("min", "median", "max")))
        lines.append("           " + ", ".join(f"{_by(size)}: {count:,}" for size, count in sizes["most_common"]))
        for title in ("modes", "formats"):
            lines.append(f"{title:<10} " + ", ".join(f"{word}: {count:,}" for word, count in report[title].items()))
    lines.append(f"corrupt    {len(report['corrupt']):,}")
    lines += _some([f"{item['key']}: {item['reason']}" for item in report["corrupt"]])
    copies = sum(len(keys) - 1 for keys in report["duplicates"])
    lines.append(f"duplicates {copies:,}")
    lines += _some([" = ".join(keys) for keys in report["duplicates"]])
    return "\n".join(lines)


def _read_folder(path: str) -> Iterable[_Image]:
    root = Path(path)

    def read(key: str) -> _Image:
        label = key.partition("/")[0] if "/" in key else ""
        try:
            with Image.open(root / key) as opened:
                kind = opened.format or ""
                image = ImageOps.exif_transpose(opened)
                # Pixels, not file bytes: a copy saved again without loss is a copy too.
                digest = hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=16)
                return _Image(key, label, (image.height, image.width), image.mode, kind, digest.digest())
        except Exception as error:  # Pillow's decoders raise a dozen unrelated types on broken bytes
            return _Image(key, label, problem=describe(error, root / key))

    # Threads are enough: Pillow's decoders and the hash let go of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(read, scan(path))


def _read_set(word: str) -> Iterable[_Image]:
    from genkit.data.emoji import Emoji
    from genkit.data.fashion import Fashion

    dataset = Fashion(split="all") if word == "fashion" else Emoji(size=136)
    mode = "L" if dataset.info.shape[0] == 1 else "RGB"
    size = (dataset.info.shape[1], dataset.info.shape[2])
    for key, label, pixels in zip(dataset.keys, dataset.labels.tolist(), dataset.pixels.numpy(), strict=True):
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        yield _Image(key, dataset.info.class_names[label], size, mode, "built in", digest)


def _by(size: list[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _some(lines: list[str]) -> list[str]:
    more = [f"           ... and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return [f"           {line}" for line in lines[:SHOWN]] + more
