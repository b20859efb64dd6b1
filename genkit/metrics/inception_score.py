"""Inception score: are single images clearly of a class, and all of them together of many? (Salimans et al. 2016, arXiv:1606.03498)

Looks at samples alone: a model that repeats one perfect image of every class scores best. Tools differ in three points that change the number: the bias
of the last layer, whether images are shuffled, and how many share a split.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genkit.errors import GenkitError, UsageError
from genkit.metrics import features as nets
from genkit.metrics.rows import FeatureRows

# Images per split of the published protocols; with fewer the score comes out lower.
FULL_SPLIT = 5000


def inception_score(
    logits: Tensor, *, splits: int = 10, split_size: int | None = None, shuffle_seed: int | None = None
) -> tuple[float, float]:
    """exp of the mean divergence of p(class | image) from its mean (Salimans et al. 2016, section 4): mean and standard deviation over splits.

    Args:
        logits: [N, classes].
        splits: number of contiguous splits, as even as can be.
        split_size: instead of `splits`: images of a split, as in the ADM evaluator; the last one may be smaller.
        shuffle_seed: of numpy's RandomState, which permutes the images first, as torch-fidelity does with 2020; None = leave them in order.

    Raises: UsageError for fewer images than splits.
    """
    count = len(logits)
    if split_size is not None:
        bounds = [*range(0, count, split_size), count]
    else:
        bounds = [i * count // splits for i in range(splits + 1)]
    if count < max(2, len(bounds) - 1):
        raise UsageError(f"the Inception score of {len(bounds) - 1} splits needs at least as many images, got {count}")
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(count)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    scores = []
    for first, last in itertools.pairwise(bounds):
        log_p = logits[first:last].double().log_softmax(1)
        p = log_p.exp()
        # 0 log 0 = 0, which a class that no image of the split can be would otherwise make nan.
        divergence = (p * (log_p - p.mean(0).log())).where(p > 0, 0.0).sum(1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


class InceptionScore:
    """Inception score of `fake`, 1 to the number of classes.

    Args:
        features: feature net with logits, a name of genkit.metrics.features.
        count: samples to generate; a set of images that exists is used whole.
        weights: of the feature net: a file, or a folder that holds it.
        splits: contiguous splits; the score is their mean.
        split_size: instead of `splits`: images of a split (ADM: 5000).
        shuffle_seed: permute the images first (torch-fidelity: 2020); null = in order.
    """

    better: Literal["lower", "higher"] = "higher"

    def __init__(
        self,
        *,
        features: str = "fashion-cnn",
        count: int = 5000,
        weights: str | None = None,
        splits: int = 10,
        split_size: int | None = None,
        shuffle_seed: int | None = None,
    ):
        if splits < 1 or (split_size is not None and split_size < 1):
            raise UsageError(f"inception_score: splits={splits} and split_size={split_size} must be at least 1")
        self.net = nets.load(features, weights)
        if "logits" not in self.net.dims:
            raise GenkitError(f"{features} has no logits; inception_score needs a classifier such as inception-2015")
        self.count = count
        self.splits, self.split_size, self.shuffle_seed = splits, split_size, shuffle_seed
        self.fake = FeatureRows(self.net.dims["logits"])

    @property
    def protocol(self) -> str:
        split = f"splits of {self.split_size}" if self.split_size is not None else f"{self.splits} splits"
        order = "in order" if self.shuffle_seed is None else f"shuffled with {self.shuffle_seed}"
        return f"{self.net.protocol} sha {self.net.sha256[:8]}, {split} {order}"

    def update(
        self,
        *,
        fake: nets.ImageBatch | Tensor | None = None,
        number: Tensor | None = None,
        total: int | None = None,
        **_: Any,
    ) -> None:
        """Images [B, C, Y, X] in [-1, 1]; `number` and `total` say which of how many (see FeatureRows)."""
        if fake is not None:
            self.fake.update(nets.as_batch(fake).features(self.net, "logits"), number, total)

    def state(self) -> dict[str, Tensor]:
        return self.fake.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.fake.restore(state)

    def result(self) -> dict[str, float]:
        """{"IS": mean over splits, "IS std": standard deviation}; "IS (protocol)" for nets other than Inception-2015 with its published weights."""
        mean, std = inception_score(
            self.fake.rows(), splits=self.splits, split_size=self.split_size, shuffle_seed=self.shuffle_seed
        )
        is_known = self.net.name == "inception-2015" and self.net.is_published
        place = "" if is_known else f" ({self.net.protocol})"
        return {f"IS{place}": mean, f"IS std{place}": std}

    def notes(self) -> list[str]:
        per_split = self.split_size if self.split_size is not None else len(self.fake) // self.splits
        per_split = min(per_split, len(self.fake))
        if per_split >= FULL_SPLIT:
            return []
        return [
            f"IS: {per_split} images per split are fewer than the usual {FULL_SPLIT}; the score comes out lower with fewer"
        ]
