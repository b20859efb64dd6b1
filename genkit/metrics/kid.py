"""Kernel Inception distance: the squared maximum mean discrepancy under a cubic kernel (Bińkowski et al. 2018, arXiv:1801.01401).

Unbiased for any number of images, where a Fréchet distance of few is too large: values a little below 0 are normal for equal sets.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics.comparison import SetMetric
from genkit.metrics.neighbours import BLOCK


def mmd2(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 (Bińkowski et al. 2018, eq. 4; Gretton et al. 2012, eq. 3).

    Products are formed in the precision of the vectors, everything after in double; the order of the rows changes the last digits only.
    Memory beside the vectors is bounded by neighbours.BLOCK.

    Args:
        real: [N, D], N > 1.
        fake: [M, D], M > 1.

    Raises: UsageError for a single vector, which has no pair to compare.
    """
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise UsageError(f"KID needs at least 2 images on each side, got {n} real and {m} fake")
    within = _kernel_sum(real, real, diagonal=False) / (n * (n - 1)) + _kernel_sum(fake, fake, diagonal=False) / (
        m * (m - 1)
    )
    return within - 2 * _kernel_sum(real, fake) / (n * m)


def mmd2_of_subsets(real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of mmd2 over random subsets, with the draws of torch-fidelity.

    Args:
        real: [N, D], at least subset_size vectors.
        fake: [M, D], at least subset_size vectors.
        seed: of numpy's RandomState; for each subset the fake vectors are drawn first, then the real ones.
    """
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(draw.choice(len(fake), subset_size, replace=False)).to(fake.device)]
        y = real[torch.from_numpy(draw.choice(len(real), subset_size, replace=False)).to(real.device)]
        values.append(mmd2(y, x))
    return float(np.mean(values)), float(np.std(values))


def _kernel_sum(x: Tensor, y: Tensor, *, diagonal: bool = True) -> float:
    """Sum of the kernel over all pairs of rows; without those of equal numbers if not `diagonal`."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    step = max(1, BLOCK // len(y))
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        kernel = (rows @ y.T).double().div_(x.shape[1]).add_(1).pow_(3)  # [b, M]
        total += kernel.sum()
        if not diagonal:
            total -= kernel.diagonal(start).sum()
    return float(total)


class Kid(SetMetric):
    """KID of `fake` to `real`, 0 = equal. In plain units: many papers print it times 1000.

    Args:
        features: feature net, a name of genkit.metrics.features.
        reference: where `real` comes from: "train" or "val" of the run's own data, a dataset word, a folder, an npz of images or of features.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
        subsets: random subsets whose mean is taken; null = one estimate from all pairs, which varies less.
        subset_size: images of each side in a subset. With fewer images than that the estimate is from all pairs.
        seed: of the subsets.
    """

    better: Literal["lower", "higher"] = "lower"

    def __init__(
        self,
        *,
        features: str = "fashion-cnn",
        reference: str = "train",
        count: int = 5000,
        weights: str | None = None,
        subsets: int | None = 100,
        subset_size: int = 1000,
        seed: int = 2020,
    ):
        if (subsets is not None and subsets < 1) or subset_size < 2:
            raise UsageError(f"kid: subsets={subsets} must be at least 1 or null, subset_size={subset_size} at least 2")
        super().__init__(features=features, reference=reference, count=count, weights=weights)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    @property
    def protocol(self) -> str:
        if self._is_whole():
            return f"{super().protocol}, unbiased over all pairs"
        return f"{super().protocol}, {self.subsets} subsets of {self.subset_size}, seed {self.seed}"

    def result(self) -> dict[str, float]:
        """{"KID": distance}, and with subsets {"KID std": over subsets; not an error of the mean, for they overlap}."""
        real, fake = self.real.rows(), self.fake.rows()
        if self.subsets is None or self._is_whole():
            return {"KID": mmd2(real, fake)}
        mean, std = mmd2_of_subsets(real, fake, subsets=self.subsets, subset_size=self.subset_size, seed=self.seed)
        return {"KID": mean, "KID std": std}

    def notes(self) -> list[str]:
        if self.subsets is None or not self._is_whole():
            return []
        return [
            f"KID: {len(self.fake)} evaluated and {len(self.real)} reference images do not fill subsets of {self.subset_size}; "
            "estimated once from all pairs"
        ]

    def _is_whole(self) -> bool:
        return self.subsets is None or min(len(self.real), len(self.fake)) < self.subset_size
