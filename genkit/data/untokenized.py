"""Images as the tokens of a generator that works on pixels: nothing is encoded, nothing is written to disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from genkit.data.loader import take
from genkit.interfaces import Dataset
from genkit.rng import Rng


class Pixelwise:
    """A dataset with its images encoded as they come: "z" instead of "x"; `meta` as of a token cache.

    Args:
        std: pixels are divided by it, as tokenizers/pixels.py does.
    """

    def __init__(self, dataset: Dataset, std: float):
        self.dataset, self.info, self.std = dataset, dataset.info, std
        self.meta: dict[str, Any] = {"grid": list(dataset.info.shape[1:]), "stride": 1}

    @property
    def sizes(self) -> np.ndarray | None:
        """[N, 2]: every sample's own size; None where all have the same."""
        return self.dataset.sizes if self.info.unit else None  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._encoded(dict(self.dataset[index]))

    def __getitems__(self, indices: np.ndarray) -> dict[str, Any]:
        return self._encoded(take(self.dataset, indices))

    def fetch(self, indices: np.ndarray, rng: Rng) -> dict[str, Any]:
        """As the dataset fetches while training, flips and all."""
        if hasattr(self.dataset, "fetch"):
            return self._encoded(self.dataset.fetch(indices, rng))
        return self.__getitems__(indices)

    def note(self, skipped: Any) -> None:
        if hasattr(self.dataset, "note"):
            self.dataset.note(skipped)

    def _encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in batch.items() if name != "x"}
        return rest if "x" not in batch else {"z": batch["x"] / self.std, **rest}
