"""What an image is called, for generators that read texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from genkit.errors import UsageError
from genkit.nn.text import bytes_of

_CODE_POINT = re.compile(r"[0-9A-F]{4,6} ")  # in front of the names of emoji


def captions(batch: Mapping[str, Any], class_names: Sequence[str]) -> list[str]:
    """Of a batch of training: the name of an emoji ("grinning face"), of other images that of their class; empty where there is none."""
    found = []
    for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
        named = _CODE_POINT.match(key)
        found.append(key[named.end() :] if named else class_names[label] if label >= 0 else "")
    return found


def reads_texts(backbone: Any) -> int | None:
    """Of how many letters texts are that a generator reads; None = it reads none."""
    return getattr(backbone, "config", {}).get("text_length")


def condition(
    backbone: Any, labels: Tensor, class_names: Sequence[str], texts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """What a generator is told: labels, and where it reads texts these, by default the names of the classes.

    Raises: UsageError for texts that the generator does not read, or not one for each sample.
    """
    length = reads_texts(backbone)
    if length is None:
        if texts is not None:
            raise UsageError(
                "texts were given, but this generator reads none; train one with backbone.text_length, or leave them out"
            )
        return {"label": labels}
    if texts is None:
        texts = [class_names[label] if label >= 0 else "" for label in labels.tolist()]
    if len(texts) != len(labels):
        raise UsageError(f"{len(texts)} texts for {len(labels)} samples; give one for each")
    return {"label": labels, "text": bytes_of(texts, length).to(labels.device)}
