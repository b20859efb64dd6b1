"""What is in a folder of meshes: every file read once, nothing written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from genkit.data.folder import EXTENSIONS
from genkit.errors import GenkitError
from genkit.meshes import storage
from genkit.meshes.mesh import inspect

SHOWN = 20  # files named on the screen; the report itself names all


def has_only_meshes(path: str) -> bool:
    """Whether a path is a folder with meshes in it and no images: which of the two checks it wants."""
    if not Path(path).is_dir():
        return False
    suffixes = {file.suffix.lower() for file in Path(path).rglob("*") if file.is_file()}
    return bool(suffixes & set(storage.SUFFIXES)) and not suffixes & set(EXTENSIONS)


def report(path: str) -> dict[str, Any]:
    """Read everything below a folder.

    Returns plain data, ready for JSON: "path", "files", "good", "watertight", "classes" {name: good files}, "unlabelled", "formats" {word: count},
        "faces" and "components" {"min", "median", "max"}, "open" [{"key", "reason"}] of meshes that are not watertight, "corrupt" the same of
        files that hold no surface.

    Raises: UsageError for a path that is missing, not a folder, or without meshes.
    """
    keys = storage.scan(path)
    found, corrupt = {}, []
    for key in keys:
        try:
            found[key] = inspect(storage.load(Path(path) / key))
        except GenkitError as error:
            corrupt.append({"key": key, "reason": str(error).removeprefix(f"{Path(path) / key}: ")})
    classes = Counter({key.partition("/")[0]: 0 for key in keys if "/" in key})
    classes.update(key.partition("/")[0] for key in found if "/" in key)
    return {
        "path": path,
        "files": len(keys),
        "good": len(found),
        "watertight": sum(f.is_watertight for f in found.values()),
        "classes": dict(sorted(classes.items())),
        "unlabelled": sum("/" not in key for key in found),
        "formats": dict(Counter(Path(key).suffix[1:].lower() for key in keys).most_common()),
        "faces": _spread([f.num_faces for f in found.values()]),
        "components": _spread([f.num_components for f in found.values()]),
        "open": [{"key": key, "reason": str(f)} for key, f in found.items() if not f.is_watertight],
        "corrupt": corrupt,
    }


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['path']}: {report['good']:,} good meshes of {report['files']:,} files, {report['watertight']:,} of them watertight"
    ]
    if report["classes"]:
        lines.append(f"classes    {len(report['classes'])}")
        lines += [f"           {count:>8,}  {name}" for name, count in report["classes"].items()]
    if report["unlabelled"]:
        lines.append(f"unlabelled {report['unlabelled']:,}")
    lines.append("formats    " + ", ".join(f"{word}: {count:,}" for word, count in report["formats"].items()))
    for title in ("faces", "components"):
        if report[title]:
            lines.append(f"{title:<10} " + ", ".join(f"{word} {value:,}" for word, value in report[title].items()))
    for title, items in (("corrupt", report["corrupt"]), ("open", report["open"])):
        lines.append(f"{title:<10} {len(items):,}")
        lines += [f"           {item['key']}: {item['reason']}" for item in items[:SHOWN]]
        lines += [f"           and {len(items) - SHOWN:,} more (--json names all)"] if len(items) > SHOWN else []
    return "\n".join(lines)


def _spread(numbers: list[int]) -> dict[str, int]:
    ordered = sorted(numbers)
    return {word: ordered[i] for word, i in (("min", 0), ("median", len(ordered) // 2), ("max", -1))} if ordered else {}
