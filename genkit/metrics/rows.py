"""Feature vectors kept one by one, for metrics that compare images with images."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.errors import GenkitError


class FeatureRows:
    """A vector per image, in the order of the images' numbers, whatever batches and processes they came in.

    Args:
        dim: D, length of a vector.
    """

    def __init__(self, dim: int):
        self.values = torch.zeros(0, dim)
        self.seen = torch.zeros(0)  # 1 where a vector has arrived; a float, so that it can be summed over processes

    def update(self, features: Tensor, number: Tensor | None = None, total: int | None = None) -> None:
        """Take in features [B, D]. A number that was seen before is skipped, so that several metrics may feed one collection.

        Args:
            number: [B] int64, of each image among all; by default they follow those already here.
            total: how many images there will be in all, where that is known: memory is then taken once.

        Raises: GenkitError when a feature is not finite.
        """
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            raise GenkitError(
                f"{int((~finite).sum())} of {len(features)} images have features that are not finite; look for NaN in them"
            )
        if number is None:
            number = torch.arange(len(self.seen), len(self.seen) + len(features))
        self._grow(max(total or 0, int(number.max()) + 1 if len(number) else 0))
        new = self.seen[number] == 0
        self.values[number[new]] = features[new.to(features.device)].float().cpu()
        self.seen[number[new]] = 1

    def rows(self) -> Tensor:
        """[N, D] float32 of the images seen, in the order of their numbers."""
        return self.values if bool(self.seen.all()) else self.values[self.seen > 0]

    def __len__(self) -> int:
        return int(self.seen.sum())

    def state(self) -> dict[str, Tensor]:
        """Zero where nothing has arrived here: adding another process's in place merges the two."""
        return {"values": self.values, "seen": self.seen}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.values, self.seen = state["values"].clone(), state["seen"].clone()

    def _grow(self, total: int) -> None:
        if total > len(self.seen):
            missing = total - len(self.seen)
            self.values = torch.cat([self.values, self.values.new_zeros(missing, self.values.shape[1])])
            self.seen = torch.cat([self.seen, self.seen.new_zeros(missing)])
