"""Shapes that stand in for what a request does not give: those that were not trained on, by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genkit import registry
from genkit.errors import UsageError


def held_out(data: Mapping[str, Any]) -> Any:
    """The split val of a checked section `data`; the data themselves where there is none. Raises UsageError where they are not there."""
    try:
        return registry.build("data", {**data, "split": "val"})
    except UsageError:
        return registry.build("data", dict(data))


def of_class(shapes: Any, label: int, class_names: Sequence[str]) -> list[int]:
    """Numbers of the shapes of a class, -1 = of any. Raises UsageError where there is none."""
    of_each = getattr(shapes, "labels", None) or [i % len(class_names) for i in range(len(shapes))]
    own = [i for i, other in enumerate(of_each) if label in (-1, other)]
    if not own:
        raise UsageError(
            f"no held-out shape is of class {class_names[label]}; say what to draw by --image or --caption"
        )
    return own
