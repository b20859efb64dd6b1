"""What a generator was not trained to listen to."""

from __future__ import annotations

from typing import Any

from genkit.errors import UsageError

_GIVEN = {"texts": "captions were", "database": "a database was", "images": "pictures were"}


def refuse(told: str, **given: tuple[Any, str]) -> None:
    """Raises UsageError for the first argument of a request that is there.

    Args:
        told: what the generator was trained on, in words.
        given: name of the argument -> (its value, what to do instead).
    """
    for name, (value, advice) in given.items():
        if value is not None:
            raise UsageError(f"{_GIVEN[name]} given, and this generator was trained on {told}; {advice}")
