"""Class accuracy: does an independent classifier see in each sample the class that was asked for?"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics import features as nets


class ClassAccuracy:
    """Share of `fake` that the classifier assigns to `label`.

    A score above the classifier's own accuracy on real images means typical samples, not better ones.

    Args:
        features: feature net with named classes, in the order the labels are numbered.
        count: samples to generate; a set of images that exists is used whole.

    Raises: UsageError for a net without named classes.
    """

    better: Literal["lower", "higher"] = "higher"

    def __init__(self, *, features: str = "fashion-cnn", count: int = 5000, weights: str | None = None):
        self.net = nets.load(features, weights)
        if not self.net.class_names:
            raise UsageError(
                f"class_accuracy: {features} has no named classes that labels could be compared with; use fashion-cnn"
            )
        self.count = count
        self.correct = torch.zeros(len(self.net.class_names), dtype=torch.float64)
        self.asked = torch.zeros_like(self.correct)

    @property
    def protocol(self) -> str:
        return f"{self.net.protocol} sha {self.net.sha256[:8]}"

    def update(self, *, fake: nets.ImageBatch | Tensor, label: Tensor | None = None, **_: Any) -> None:
        """Images [B, C, Y, X] in [-1, 1] and the classes asked for, [B] int64. Raises UsageError for a label that is no class."""
        if label is None:
            raise UsageError("class_accuracy needs labels; these images have none")
        classes = len(self.net.class_names)
        wrong = label[(label < 0) | (label >= classes)]
        if len(wrong):
            raise UsageError(
                f"class_accuracy: label {int(wrong[0])} is out of range; {self.net.name} knows 0-{classes - 1}"
            )
        predicted = self.net.classify(nets.as_batch(fake).features(self.net)).argmax(1).cpu()
        label = label.cpu()
        self.asked += torch.bincount(label, minlength=classes)
        self.correct += torch.bincount(label[predicted == label], minlength=classes)

    def state(self) -> dict[str, Tensor]:
        return {"correct": self.correct, "asked": self.asked}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.correct, self.asked = state["correct"].clone(), state["asked"].clone()

    def result(self) -> dict[str, float]:
        """{"class accuracy": share in [0, 1], "class accuracy: NAME": of that class, for every class that was asked for}."""
        if not self.asked.sum():
            raise UsageError("class_accuracy has seen no images")
        overall = {"class accuracy": float(self.correct.sum() / self.asked.sum())}
        shares = zip(self.net.class_names, self.correct.tolist(), self.asked.tolist(), strict=True)
        return overall | {f"class accuracy: {name}": correct / asked for name, correct, asked in shares if asked}
