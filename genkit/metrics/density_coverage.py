"""Density and coverage: precision and recall that single outliers do not decide (Naeem et al. 2020, arXiv:2002.09797)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics.comparison import SetMetric
from genkit.metrics.neighbours import count_balls, kth_distance


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """How many balls of `real` hold a point of `fake`, and how many of them hold any (Naeem et al. 2020, eq. 3 and 4).

    A ball around a real point reaches its k-th nearest other real point; the rim is outside, as in the authors' package prdc.

    Args:
        real: [N, D], N > k.
        fake: [M, D].

    Returns: density, the mean number of balls around a fake point over k: about 1 for equal distributions, and not bounded; coverage in [0, 1].
    """
    of_fake, of_balls = count_balls(fake, real, kth_distance(real, k), closed=False)
    return float(of_fake.double().mean()) / k, float((of_balls > 0).double().mean())


class DensityCoverage(SetMetric):
    """Density and coverage of `fake`. With N images on each side, coverage of equal distributions is about 1 - 2^-k.

    Args:
        features: feature net, a name of genkit.metrics.features.
        reference: where `real` comes from: "train" or "val" of the run's own data, a dataset word, a folder, an npz of images or of features.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
        k: the neighbour a ball reaches to.
    """

    better: Literal["lower", "higher"] = "higher"

    def __init__(
        self,
        *,
        features: str = "fashion-cnn",
        reference: str = "train",
        count: int = 5000,
        weights: str | None = None,
        k: int = 5,
    ):
        if k < 1:
            raise UsageError(f"density_coverage: k={k} must be at least 1")
        super().__init__(features=features, reference=reference, count=count, weights=weights)
        self.k = k

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, k={self.k}"

    def result(self) -> dict[str, float]:
        """{"density": at least 0, "coverage": share}. Raises UsageError for k real images or fewer, or no fake one."""
        if not len(self.fake):
            raise UsageError("density_coverage has seen no fake images")
        density, coverage = density_coverage(self.real.rows(), self.fake.rows(), self.k)
        return {"density": density, "coverage": coverage}
