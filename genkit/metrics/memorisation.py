"""Memorisation: are samples copies of training images? (AuthPct: Alaa et al. 2022, arXiv:2102.08921; as in Stein et al. 2023, arXiv:2306.04675)

Every sample is held against its nearest training image in feature space, and that distance against the distance of the same training image to
its own nearest neighbour: a sample that is nearer to an image than other training images are is suspicious.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics.comparison import SetMetric
from genkit.metrics.neighbours import nearest

# Training images that are there twice have a neighbour at distance 0, beside which no copy would look near. For ratios they are taken to be
# this far from it, as a share of the median over training images.
_FLOOR = 0.1


@dataclass(frozen=True)
class Matches:
    """What is nearest to each sample, in the order of the samples.

    Attributes:
        number: [N] int64, of the nearest training image.
        distance: [N] float64, to it.
        gap: [N] float64, from that image to its own nearest training image.
    """

    number: Tensor
    distance: Tensor
    gap: Tensor

    @property
    def authpct(self) -> float:
        """Percentage of samples farther from their nearest training image than that image is from its own nearest (Alaa et al. 2022, eq. 8)."""
        return 100 * float((self.distance > self.gap).double().mean())

    @property
    def ratio(self) -> Tensor:
        """[N] float64: distance over gap. 0 = the image itself, near 1 = what other training images are."""
        floor = _FLOOR * self.gap.median()
        scale = torch.maximum(self.gap, floor)
        return torch.where(self.distance > 0, self.distance / scale, 0.0)


def match(real: Tensor, fake: Tensor) -> Matches:
    """The nearest training image of every sample.

    Args:
        real: [M, D], training images, at least 2.
        fake: [N, D], samples.

    Raises: UsageError for fewer.
    """
    if len(real) < 2 or not len(fake):
        raise UsageError(f"memorisation needs at least 2 training images and a sample, got {len(real)} and {len(fake)}")
    distance, number = nearest(fake, real)
    found, place = number.unique(return_inverse=True)
    gap, _ = nearest(real[found], real, itself=found)
    return Matches(number, distance, gap[place])


class Memorisation(SetMetric):
    """How near `fake` comes to the training images `real`.

    The scale of AuthPct is set by fresh real images, not by 100. Of Fashion-MNIST images that no model has seen, 64 to 67 % count as authentic on
    fashion-cnn and 0.1 to 0.3 % as near-copies; in other feature spaces other values are normal. So evaluate held-out images of the same kind and
    number against the same training images: a model well below their AuthPct, or well above their near-copies, copies. An image that was moved or
    recoloured may escape, and a few near-copies of things that look alike anyway are no proof: look at the pairs.

    Args:
        features: feature net, a name of genkit.metrics.features.
        reference: the training images: "train" of the run's own data, a dataset word, a folder, an npz of images or of features.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
        near: a sample is called a near-copy when its distance to a training image is below this share of that image's distance to its own
            nearest neighbour.
    """

    better: Literal["lower", "higher"] = "higher"

    def __init__(
        self,
        *,
        features: str = "fashion-cnn",
        reference: str = "train",
        count: int = 5000,
        weights: str | None = None,
        near: float = 0.5,
    ):
        if not 0 < near <= 1:
            raise UsageError(f"memorisation: near={near} must lie in (0, 1]")
        super().__init__(features=features, reference=reference, count=count, weights=weights)
        self.near = near

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, near-copy below {self.near:g}"

    def result(self) -> dict[str, float]:
        """{"AuthPct": 0 to 100, higher = fewer suspicious samples, "near-copies": share of samples}."""
        found = self._match()
        return {"AuthPct": found.authpct, "near-copies": float((found.ratio < self.near).double().mean())}

    def pairs(self, limit: int) -> list[tuple[int, int, float]]:
        """(number of the sample, number of its nearest training image, ratio of distances), the most suspicious first, at most `limit`.

        A ratio below 1 is nearer than the training image's own nearest neighbour.
        """
        found = self._match()
        order = found.ratio.argsort(stable=True)[:limit]
        samples, images = (side.seen.nonzero()[:, 0] for side in (self.fake, self.real))
        return list(
            zip(samples[order].tolist(), images[found.number[order]].tolist(), found.ratio[order].tolist(), strict=True)
        )

    def _match(self) -> Matches:
        return match(self.real.rows(), self.fake.rows())
