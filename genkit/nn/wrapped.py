"""The network inside the wrapper of distributed training, which shows nothing of it but `forward`."""

from __future__ import annotations

from typing import Any


def unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)
