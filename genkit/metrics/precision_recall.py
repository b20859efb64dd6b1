"""Improved precision and recall: is what is generated real, and is what is real generated? (Kynkäänniemi et al. 2019, arXiv:1904.06991)"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics.comparison import SetMetric
from genkit.metrics.neighbours import count_balls, kth_distance


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of `fake` inside the manifold of `real`, and of `real` inside that of `fake` (Kynkäänniemi et al. 2019, eq. 1 and 2).

    The manifold of a set is the union of balls around its points, each just reaching its k-th nearest other point. The rim belongs to the
    ball, as in the ADM evaluator and torch-fidelity; prdc leaves it out.

    Args:
        real: [N, D], N > k.
        fake: [M, D], M > k.

    Returns: precision and recall, each in [0, 1].
    """
    real_balls, _ = count_balls(fake, real, kth_distance(real, k), closed=True)
    fake_balls, _ = count_balls(real, fake, kth_distance(fake, k), closed=True)
    return float((real_balls > 0).double().mean()), float((fake_balls > 0).double().mean())


class PrecisionRecall(SetMetric):
    """Precision and recall of `fake`. Both depend on how many images there are: compare only equal numbers.

    Args:
        features: feature net, a name of genkit.metrics.features.
        reference: where `real` comes from: "train" or "val" of the run's own data, a dataset word, a folder, an npz of images or of features.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
        k: the neighbour a ball reaches to.
        max_reference: only so many reference images count, spread evenly over all (ADM: 10,000, for its files hold no more); null = all.
    """

    better: Literal["lower", "higher"] = "higher"

    def __init__(
        self,
        *,
        features: str = "fashion-cnn",
        reference: str = "train",
        count: int = 5000,
        weights: str | None = None,
        k: int = 3,
        max_reference: int | None = None,
    ):
        if k < 1 or (max_reference is not None and max_reference < 1):
            raise UsageError(f"precision_recall: k={k} and max_reference={max_reference} must be at least 1")
        super().__init__(features=features, reference=reference, count=count, weights=weights)
        self.k, self.max_reference = k, max_reference

    @property
    def protocol(self) -> str:
        limit = "" if self.max_reference is None else f", at most {self.max_reference} reference images"
        return f"{super().protocol}, k={self.k}{limit}"

    def result(self) -> dict[str, float]:
        """{"precision": share, "recall": share}. Raises UsageError for k images or fewer on a side."""
        real = self.real.rows()
        if self.max_reference is not None and len(real) > self.max_reference:
            # Not those in front: files lie in folders by class, so that they would show a few classes only.
            real = real[torch.arange(self.max_reference) * len(real) // self.max_reference]
        precision, recall = precision_recall(real, self.fake.rows(), self.k)
        return {"precision": precision, "recall": recall}
