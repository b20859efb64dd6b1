"""Databases of neighbours by the words of the command line: opened for a generator that is told them, and written to a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from genkit.errors import UsageError
from genkit.labels import parse_labels


def open_database(pipeline: Any, database: str | Path | None, classes: str | None) -> Any:
    """The database by a word, None = that of training; of some of its classes alone, named as labels are.

    Raises: UsageError for a generator that is told something else, and for what cannot be a database.
    """
    if not hasattr(pipeline.told, "open"):
        raise UsageError(
            f"--database is for generators that are told neighbours; this one was trained with condition: {{type: {pipeline.condition['type']}}}"
        )
    found = pipeline.told.database if database is None else pipeline.told.open(str(database))
    return found if classes is None else found.of_classes(parse_labels(classes, found.class_names))


def write_database(
    run: str | Path, images: str, out: str | Path, *, classes: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Embed images as neighbours for a generator, into a file that `sample` takes in their place. Returns: out, entries, width, classes."""
    from genkit.pipeline import open_run

    if Path(out).suffix != ".safetensors":
        raise UsageError(f"-o {out}: a database is a file of safetensors; give it a name in .safetensors")
    pipeline = open_run(run, device=device)
    if not hasattr(pipeline, "generate"):
        raise UsageError(f"run {run} is a tokenizer; a database belongs to a generator that is told neighbours")
    found = open_database(pipeline, images, classes)
    found.save(Path(out))
    return {
        "out": str(out),
        "entries": len(found),
        "width": found.vectors.shape[1],
        "classes": list(found.class_names),
    }


def named_database(database: str | Path | None, classes: str | None) -> str:
    """For the name of a folder: "val", "cats-3,7"."""
    parts = ["" if database is None else Path(database).stem, classes or ""]
    return re.sub(r"[^A-Za-z0-9_.,]+", "-", "-".join(filter(None, parts)))
