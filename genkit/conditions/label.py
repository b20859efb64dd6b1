"""The class of an image, by its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from genkit.conditions.refusing import refuse
from genkit.interfaces import Cond
from genkit.rng import Rng


class Label:
    """cond["label"] [B] int64; -1 = no class. See genkit.interfaces.Condition."""

    def __init__(self, *, class_names: Sequence[str] = ()):
        self.class_names = tuple(class_names)
        self.takes: dict[str, int] = {"num_classes": len(self.class_names)}

    def of_batch(self, batch: Mapping[str, Any]) -> Cond:
        return {"label": batch["label"]}

    def of_request(
        self,
        labels: Tensor,
        rng: Rng,
        *,
        texts: Sequence[str] | None = None,
        database: Any = None,
        images: Sequence[Any] | None = None,
    ) -> Cond:
        refuse(
            "classes alone",
            images=(images, "choose by --labels, or train one with condition: {type: pictures}"),
            texts=(texts, "choose by --labels, or train one with condition: {type: captions}"),
            database=(database, "leave it out, or train one with condition: {type: neighbours}"),
        )
        return {"label": labels}

    def names(self, database: Any = None) -> tuple[str, ...]:
        return self.class_names

    def classes(self, database: Any = None) -> list[int]:
        return list(range(len(self.class_names)))
