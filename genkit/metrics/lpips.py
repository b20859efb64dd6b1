"""LPIPS of reconstructions: the mean perceptual distance of images to their originals (Zhang et al. 2018; VGG16, version 0.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics import features as nets
from genkit.nn.lpips import load_lpips

_CHUNK = 16  # pairs at once: at 256x256 the first layers of a pair take 130 MB


class LPIPS:
    """Mean distance of pairs, 0 = equal. Images are rounded to 8 bits first, as they would be in a file; no resizing.

    Args:
        weights: of VGG16 and the heads, as in genkit.nn.lpips.load_lpips; by default $GENKIT_WEIGHTS or the cache folder.
        count: images to reconstruct; null = the whole split.
    """

    def __init__(self, *, weights: str | None = None, count: int | None = None):
        self.count = count
        self.distance = load_lpips(weights)
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in ("lpips", "images")}

    @property
    def protocol(self) -> str:
        trunk, heads = self.distance.sha256
        other = "" if self.distance.is_published else " (other weights)"
        return f"LPIPS vgg16 v0.1{other}, 8 bits, mean over images, sha {trunk[:8]}+{heads[:8]}"

    @torch.no_grad()
    def update(self, *, real: nets.ImageBatch | Tensor, fake: nets.ImageBatch | Tensor, **_: Any) -> None:
        """Images and their reconstructions, both [B, C, Y, X] in [-1, 1], in the same order."""
        x, y = nets.as_batch(real).x, nets.as_batch(fake).x
        self.distance.to(x.device)
        for pair in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
            self.sums["lpips"] += self.distance(*pair).double().sum().cpu()
        self.sums["images"] += len(x)

    def state(self) -> dict[str, Tensor]:
        return self.sums

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        for name, value in self.sums.items():
            value.copy_(state[name])

    def result(self) -> dict[str, float]:
        """{"LPIPS": mean distance}. Raises UsageError before any image."""
        if not self.sums["images"]:
            raise UsageError("lpips has seen no images")
        return {"LPIPS": float(self.sums["lpips"] / self.sums["images"])}

    def notes(self) -> list[str]:
        """What a reader must know beside the number."""
        if self.distance.is_published:
            return []
        return ["LPIPS: the weights are not the published ones; comparable only with numbers from the same files"]
