"""Classes by number and by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from genkit.errors import UsageError, nearest


def class_number(label: int | str, names: Sequence[str]) -> int:
    """A class given by number or by name (any case). Raises UsageError naming the nearest class."""
    if isinstance(label, int):
        return label
    by_name = {name.lower(): i for i, name in enumerate(names)}
    if label.lower() not in by_name:
        raise UsageError(f"no class is called '{label}'; {nearest(label, list(names))}")
    return by_name[label.lower()]


def parse_labels(text: str | Sequence[int | str] | None, class_names: Sequence[str]) -> list[int]:
    """Class numbers from "0-9", "3,7", "Sneaker,Bag" or a list; None = every class, or [-1] for an unconditional model.

    Raises: UsageError for a number out of range or an unknown name.
    """
    if text is None:
        return list(range(len(class_names))) or [-1]
    chosen: list[int] = []
    for word in text.split(",") if isinstance(text, str) else text:
        if isinstance(word, str) and (span := re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", word)):
            chosen += range(int(span[1]), int(span[2]) + 1)
        elif isinstance(word, str) and re.fullmatch(r"\s*-?\d+\s*", word):
            chosen.append(int(word))
        else:
            chosen.append(class_number(word.strip() if isinstance(word, str) else word, class_names))
    wrong = [label for label in chosen if not -1 <= label < len(class_names)]
    if wrong or not chosen:
        classes = f"0-{len(class_names) - 1}" if class_names else "none: the model is unconditional"
        raise UsageError(
            f"labels {text!r}: {wrong[0] if wrong else 'nothing'} is not a class of this model (classes {classes})"
        )
    return chosen
