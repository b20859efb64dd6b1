"""Fréchet distance between the features of two sets of images (Heusel et al. 2017, arXiv:1706.08500).

Only on Inception-2015 and from 10,000 images per side on is it called FID; with fewer it is FID-quick, with another net FD.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genkit.errors import GenkitError
from genkit.metrics import features as nets
from genkit.metrics.statistics import FeatureSums, Moments, frechet_distance, load_moments

# Below this the bias of the estimate, which grows as 1/N, is larger than what papers argue about.
FID_COUNT = 10_000


class Frechet:
    """Distance of `fake` to `real`, 0 = equal means and covariances.

    Args:
        features: feature net, a name of genkit.metrics.features.
        reference: where `real` comes from: "train" or "val" of the run's own data, a dataset word, a folder, an npz of images or of
            statistics. Whoever feeds the metric reads images from there; statistics are read here.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
    """

    def __init__(
        self, *, features: str = "fashion-cnn", reference: str = "train", count: int = 5000, weights: str | None = None
    ):
        self.net = nets.load(features, weights)
        self.reference = reference
        self.count = count
        self.fixed: Moments | None = None
        self.real = FeatureSums(self.net.dim)
        self.fake = FeatureSums(self.net.dim)

    @property
    def protocol(self) -> str:
        return f"{self.net.protocol} sha {self.net.sha256[:8]}"

    def use(self, path: str) -> Moments:
        """Take the reference from an npz of statistics. Raises GenkitError when another net made it."""
        moments = load_moments(path)
        if moments.net_sha256 and moments.net_sha256 != self.net.sha256:
            made_by = f"{moments.protocol} (sha {moments.net_sha256[:8]})"
            raise GenkitError(f"{path} holds statistics of {made_by}; they cannot be compared with {self.protocol}")
        # A file that does not name its net is taken for Inception, the only net other tools save bare statistics of.
        if not moments.net_sha256 and (self.net.name != "inception-2015" or len(moments.mu) != self.net.dim):
            raise GenkitError(
                f"{path} does not say which net made its {len(moments.mu)}-dimensional statistics; "
                f"they cannot be compared with {self.protocol}"
            )
        self.fixed = moments
        return moments

    def update(
        self, *, fake: nets.ImageBatch | Tensor | None = None, real: nets.ImageBatch | Tensor | None = None, **_: Any
    ) -> None:
        """Images [B, C, Y, X] in [-1, 1], of either side or both."""
        for images, statistics in ((fake, self.fake), (real, self.real)):
            if images is not None:
                statistics.update(nets.as_batch(images).features(self.net))

    def state(self) -> dict[str, Tensor]:
        return {
            f"{side}.{name}": value for side in ("real", "fake") for name, value in getattr(self, side).state().items()
        }

    def result(self) -> dict[str, float]:
        """{"FD (net)" or "FID" or "FID-quick": distance}. Raises GenkitError with fewer than 2 images on a side."""
        real, fake = self._sides()
        return {
            self._name(min(real.count or FID_COUNT, fake.count)): frechet_distance(
                real.mu, real.sigma, fake.mu, fake.sigma
            )
        }

    def notes(self) -> list[str]:
        """What a reader must know beside the number."""
        return [
            f"{self._name(side.count)}: {side.count} {name} images are fewer than twice the {self.net.dim} feature dimensions; "
            "the distance is biased upwards"
            for name, side in zip(("reference", "evaluated"), self._sides(), strict=True)
            if 0 < side.count < 2 * self.net.dim
        ]

    def _sides(self) -> tuple[Moments, Moments]:
        return self.fixed or self.real.moments(), self.fake.moments()

    def _name(self, count: int) -> str:
        if self.net.name != "inception-2015":
            return f"FD ({self.net.protocol})"
        return "FID" if count >= FID_COUNT else "FID-quick"
