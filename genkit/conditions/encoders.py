"""Encoders of transformers that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from genkit.errors import UsageError
from genkit.optional import require

READERS = {"text": "AutoTokenizer", "image": "AutoImageProcessor"}  # what prepares inputs


def open_encoder(name: str, what: Literal["text", "image"]) -> tuple[Any, Any]:
    """(what prepares its inputs, the model) of a folder, or of a name in transformers' cache. Of models that translate (T5) the part that reads is opened
    alone where transformers can, else a model with both parts is returned.

    Raises: UsageError for what cannot be opened.
    """
    transformers = require("transformers")
    try:
        with _quiet(transformers.utils.logging):
            reader = getattr(transformers, READERS[what]).from_pretrained(name)
            config = transformers.AutoConfig.from_pretrained(name)
            reads_alone = what == "text" and type(config) in transformers.AutoModelForTextEncoding._model_mapping
            kind = transformers.AutoModelForTextEncoding if reads_alone else transformers.AutoModel
            return reader, kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"condition.encoder={name} is no {what} encoder that transformers can open: {reason}"
        ) from None


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without bars and without a report of the weights that the reading part does not need."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
