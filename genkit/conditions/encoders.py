"""Encoders of transformers that stay as they are."""

from __future__ import annotations

from typing import Any

from genkit.errors import UsageError
from genkit.optional import require


def open_encoder(name: str, what: str, reader: str) -> tuple[Any, Any]:
    """(what prepares its inputs, the model) of a folder, or of a name in transformers' cache.

    Args:
        what: "text" or "image".
        reader: the class of transformers that prepares inputs.

    Raises: UsageError for what cannot be opened.
    """
    transformers = require("transformers")
    try:
        return getattr(transformers, reader).from_pretrained(name), transformers.AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"condition.encoder={name} is no {what} encoder that transformers can open: {reason}"
        ) from None
