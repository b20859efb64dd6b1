"""What a verb returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a verb found: data for --json, text for people, and the exit code where the finding is that something does not hold."""

    data: Any
    text: str
    exit_code: int = 0
