"""Vendi score: how many different images a set amounts to (Friedman and Dieng 2023, arXiv:2210.02410)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from genkit.errors import GenkitError, UsageError
from genkit.metrics import features as nets
from genkit.metrics.comparison import SetMetric
from genkit.metrics.references import Reference
from genkit.metrics.statistics import FeatureSums


def vendi(second_moment: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / N, where K is the cosine similarity of all pairs of N images (Friedman and Dieng 2023, eq. 1).

    K / N = U U^T / N has the eigenvalues of U^T U / N, so that the mean outer product is all that has to be known of the images.

    Args:
        second_moment: [D, D] float64, the mean of u u^T over images, u their features of length 1.

    Returns: 1 (all alike) to min(N, D).
    """
    values = torch.linalg.eigvalsh((second_moment + second_moment.T) / 2).clamp_min(0)
    values = values / values.sum()  # 1 up to rounding, and up to images whose features are all zero
    return float(torch.special.entr(values).sum().exp())


class Vendi(SetMetric):
    """Vendi score of `fake`, and of `real` to hold it against. It grows with the number of images: compare only equal numbers.

    Args:
        features: feature net, a name of genkit.metrics.features.
        reference: where `real` comes from: "train" or "val" of the run's own data, a dataset word, a folder, an npz of images or of features.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
    """

    better: Literal["lower", "higher"] = "higher"
    collects = FeatureSums

    def __init__(
        self, *, features: str = "fashion-cnn", reference: str = "train", count: int = 5000, weights: str | None = None
    ):
        super().__init__(features=features, reference=reference, count=count, weights=weights)

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, cosine kernel"

    def use(self, reference: Reference) -> bool:
        """Take the real side from features in a file; False when it has none. Raises GenkitError when another net made them."""
        if reference.features is None:
            return False
        reference.check_net(self.net)
        if reference.features.shape[1] != self.net.dim:
            raise GenkitError(
                f"{reference.name} holds {reference.features.shape[1]}-dimensional features; {self.net.protocol} makes {self.net.dim}"
            )
        self.real.update(_directions(reference.features))
        return True

    def update(
        self, *, fake: nets.ImageBatch | Tensor | None = None, real: nets.ImageBatch | Tensor | None = None, **_: Any
    ) -> None:
        """Images [B, C, Y, X] in [-1, 1] of either side or both."""
        for images, sums in ((fake, self.fake), (real, self.real)):
            if images is not None:
                sums.update(_directions(nets.as_batch(images).features(self.net)))

    def result(self) -> dict[str, float]:
        """{"Vendi": score, "Vendi real": of the reference, where there is one}. Raises UsageError without images."""
        if self.fake.count < 2:
            raise UsageError(f"vendi needs at least 2 images, got {int(self.fake.count)}")
        sides = {"Vendi": self.fake, "Vendi real": self.real}
        return {name: vendi(_second_moment(sums)) for name, sums in sides.items() if sums.count >= 2}

    def notes(self) -> list[str]:
        real, fake = int(self.real.count), int(self.fake.count)
        if real < 2 or real == fake:
            return []
        return [f"Vendi: of {fake} images, Vendi real of {real}; the larger set scores higher for that reason alone"]


def _directions(features: Tensor) -> Tensor:
    return normalize(features.double(), dim=1)


def _second_moment(sums: FeatureSums) -> Tensor:
    some = sums.moments()
    return some.sigma * ((some.count - 1) / some.count) + torch.outer(some.mu, some.mu)
