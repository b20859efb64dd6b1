"""Fréchet distance extrapolated to infinitely many samples (Chong and Forsyth 2020, arXiv:1911.07023).

A Fréchet distance of N samples is too large by about c / N, and c depends on the model: with finite N even the order of two models can be wrong.
The distance is measured for several N; the line through it over 1 / N meets 0 at the unbiased value.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics.comparison import SetMetric
from genkit.metrics.frechet import FID_COUNT, fixed_moments, frechet_name
from genkit.metrics.references import Reference
from genkit.metrics.statistics import FeatureSums, Moments, covariance_root, frechet_distance
from genkit.rng import Rng


def fd_infinity(
    mu: Tensor, sigma: Tensor, fake: Tensor, *, points: int = 15, smallest: float = 0.1, seed: int = 0
) -> tuple[float, list[int], list[float]]:
    """The Fréchet distance of infinitely many samples (Chong and Forsyth 2020, section 3.1).

    The authors draw new subsets for every count; here each is the beginning of one random order, so that all of them cost one pass, and the result
    varies no more.

    Args:
        mu, sigma: [D] and [D, D], of the real images, all of them.
        fake: [N, D].
        points: numbers of samples, evenly spaced, the last is N.
        smallest: share of N that the first of them has.
        seed: of the order.

    Returns: the intercept, which noise can make negative; the counts; the distance at each.
    Raises: UsageError for so few samples that counts coincide.
    """
    counts = np.linspace(smallest * len(fake), len(fake), points).round().astype(int).tolist()
    if counts[0] < 2 or len(set(counts)) < points:
        raise UsageError(
            f"fd_infinity: {len(fake)} samples are too few for {points} subsets from {smallest:g} of them on"
        )
    root = covariance_root(sigma)
    order = Rng([seed]).order(len(fake))[0]
    sums, distances = FeatureSums(fake.shape[1]), []
    for first, last in zip([0, *counts], counts, strict=False):
        sums.update(fake[order[first:last]])
        some = sums.moments()
        distances.append(frechet_distance(mu, sigma, some.mu, some.sigma, root1=root))
    _, intercept = np.polyfit(1 / np.array(counts), np.array(distances), 1)
    return float(intercept), counts, distances


class FDInfinity(SetMetric):
    """Fréchet distance of `fake` to `real` at infinitely many samples. The real side is used whole and keeps its own bias.

    Args:
        features: feature net, a name of genkit.metrics.features.
        reference: where `real` comes from: "train" or "val" of the run's own data, a dataset word, a folder, an npz of images or of
            statistics.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
        points: numbers of samples at which the distance is measured.
        smallest: share of the samples that the first of them has.
        seed: of the order in which samples are added.
    """

    better: Literal["lower", "higher"] = "lower"

    def __init__(
        self,
        *,
        features: str = "fashion-cnn",
        reference: str = "train",
        count: int = 5000,
        weights: str | None = None,
        points: int = 15,
        smallest: float = 0.1,
        seed: int = 0,
    ):
        if points < 2 or not 0 < smallest < 1:
            raise UsageError(f"fd_infinity: points={points} must be at least 2, smallest={smallest} between 0 and 1")
        super().__init__(features=features, reference=reference, count=count, weights=weights)
        self.points, self.smallest, self.seed = points, smallest, seed
        self.real = FeatureSums(self.net.dim)  # only the samples are needed one by one
        self.fixed: Moments | None = None

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, {self.points} counts from {self.smallest:g} N, seed {self.seed}"

    def use(self, reference: Reference) -> bool:
        """Take the real side from a file of statistics; False when it has none. Raises GenkitError as fixed_moments does."""
        self.fixed = fixed_moments(reference, self.net, self.layer)
        return self.fixed is not None

    def result(self) -> dict[str, float]:
        """{"FID-infinity" or "FD-infinity (protocol)", as frechet_name says: distance}."""
        real, fake = self.fixed or self.real.moments(), self.fake.rows()
        name = frechet_name(self.net, min(real.count or FID_COUNT, len(fake)), suffix="-infinity")
        distance, _, _ = fd_infinity(
            real.mu, real.sigma, fake, points=self.points, smallest=self.smallest, seed=self.seed
        )
        return {name: distance}

    def notes(self) -> list[str]:
        first = round(self.smallest * len(self.fake))
        if first >= self.net.dim:
            return []
        return [
            f"FD-infinity: the smallest subset has {first} images, fewer than the {self.net.dim} feature dimensions, "
            "where the distance is no straight line over 1/N yet"
        ]
