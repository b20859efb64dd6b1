"""Fréchet distance between the features of two sets of images (Heusel et al. 2017, arXiv:1706.08500).

Only with the published weights of Inception-2015 and from 10,000 images per side on is it called FID; with fewer it is FID-quick, with another
net FD. On the spatial features it is sFID (Nash et al. 2021, arXiv:2103.03841), with the same restrictions.
"""

from __future__ import annotations

from typing import Literal

from genkit.errors import GenkitError
from genkit.metrics.comparison import SetMetric
from genkit.metrics.features import FeatureNet
from genkit.metrics.references import Reference
from genkit.metrics.statistics import FeatureSums, Moments, frechet_distance

# Below this the bias of the estimate, which grows as 1/N, is larger than what papers argue about.
FID_COUNT = 10_000

# Feature net -> what a Fréchet distance on its published weights is called.
_NAMES = {
    "inception-2015": "{}FID{}",
    "inception-2015-clean": "clean-{}FID{}",
    "inception-2015-bilinear": "{}FID{} (pytorch-fid)",
}


def frechet_name(net: FeatureNet, count: int, *, prefix: str = "", suffix: str = "") -> str:
    """What a Fréchet distance may be called.

    Args:
        count: images on the smaller side.
        prefix, suffix: put around the word: "s" for spatial features, "-infinity" for an extrapolation.

    Returns: "FID", "clean-FID" or "FID (pytorch-fid)" for published Inception weights, "FID-quick" and so on with fewer than FID_COUNT images,
        "FD (protocol)" for everything else.
    """
    if net.name not in _NAMES or not net.is_published:
        return f"{prefix}FD{suffix} ({net.protocol})"
    return _NAMES[net.name].format(prefix, suffix + ("" if count >= FID_COUNT else "-quick"))


def fixed_moments(reference: Reference, net: FeatureNet, layer: str) -> Moments | None:
    """The statistics of a reference file for one layer of a net; None when it has none.

    Raises: GenkitError when another net made them (see Reference.check_net), or they have not its dimensions.
    """
    moments = reference.moments.get(layer)
    if moments is None:
        return None
    reference.check_net(net)
    if len(moments.mu) != net.dims[layer]:
        raise GenkitError(
            f"{reference.name} holds {len(moments.mu)}-dimensional statistics; "
            f"{layer} features of {net.protocol} have {net.dims[layer]} dimensions"
        )
    return moments


class Frechet(SetMetric):
    """Distance of `fake` to `real`, 0 = equal means and covariances.

    Args:
        features: feature net, a name of genkit.metrics.features.
        layer: "pool" for FID, "spatial" for sFID, which sees where in the image things are; not every net has it.
        reference: where `real` comes from: "train" or "val" of the run's own data, a dataset word, a folder, an npz of images or of
            statistics.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
    """

    better: Literal["lower", "higher"] = "lower"
    collects = FeatureSums

    def __init__(
        self,
        *,
        features: str = "fashion-cnn",
        layer: Literal["pool", "spatial"] = "pool",
        reference: str = "train",
        count: int = 5000,
        weights: str | None = None,
    ):
        self.layer = layer
        super().__init__(features=features, reference=reference, count=count, weights=weights)
        self.fixed: Moments | None = None

    def use(self, reference: Reference) -> bool:
        """Take the real side from a file of statistics; False when it has none of this layer. Raises GenkitError as fixed_moments does."""
        self.fixed = fixed_moments(reference, self.net, self.layer)
        return self.fixed is not None

    def result(self) -> dict[str, float]:
        """{"FID" or what frechet_name calls it: distance}. Raises GenkitError with fewer than 2 images on a side."""
        real, fake = self._sides()
        name = self._name(min(real.count or FID_COUNT, fake.count))
        return {name: frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)}

    def notes(self) -> list[str]:
        """What a reader must know beside the number."""
        dim = self.net.dims[self.layer]
        return [
            f"{self._name(side.count)}: {side.count} {name} images are fewer than twice the {dim} feature dimensions; "
            "the distance is biased upwards"
            for name, side in zip(("reference", "evaluated"), self._sides(), strict=True)
            if 0 < side.count < 2 * dim
        ]

    def _sides(self) -> tuple[Moments, Moments]:
        return self.fixed or self.real.moments(), self.fake.moments()

    def _name(self, count: int) -> str:
        return frechet_name(self.net, count, prefix="s" if self.layer == "spatial" else "")
