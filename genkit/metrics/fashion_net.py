"""A small classifier of 28x28 grey Fashion-MNIST images: the offline feature net.

Trained by scripts/train_feature_net.py on the 60,000 images of the train split. The 10,000 images embedded in the package are the *test*
split, so the net has never seen what quick-start models train on, and its opinion of their samples is independent.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from genkit.errors import UsageError

WEIGHTS = Path(__file__).parent / "weights" / "fashion-cnn-v1.safetensors"
SHA256 = "ebb83848141d93fc7a646aefa5859a1976a7af0178d1867840a36e3ddbc0eadc"
PROTOCOL = "fashion-cnn-v1"


def takes(shape: tuple[int, ...]) -> bool:
    """Whether images of this shape (C, Y, X) can be judged by the net."""
    return len(shape) == 3 and shape[0] == 1 and shape[1] == shape[2] and 28 <= shape[1] <= 32


def _layer(channels_in: int, channels_out: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class FashionCNN(nn.Module):
    """Three convolutions, 28 -> 14 -> 7 pixels, then two linear layers: the images are centred, so that places mean something."""

    dims: ClassVar[dict[str, int]] = {"pool": 128, "logits": 10}
    class_names = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    chunk = 1000  # images at once

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _layer(1, 32, 5, 2),  # [B, 32, 14, 14]
            _layer(32, 48, 3, 1),
            nn.MaxPool2d(2),  # [B, 48, 7, 7]
            _layer(48, 64, 3, 1),
            nn.Flatten(),  # [B, 3136]
            nn.Linear(64 * 7 * 7, self.dims["pool"], bias=False),
            nn.BatchNorm1d(self.dims["pool"]),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.dims["pool"], len(self.class_names))

    def features(self, x: Tensor) -> Tensor:
        """[B, 1, 28, 28] in [-1, 1] -> [B, 128], not negative.

        Images padded to at most 32x32, for models whose stride does not divide 28, lose their padding again.
        """
        if not takes(tuple(x.shape[1:])):
            got = "x".join(map(str, x.shape[1:]))
            raise UsageError(
                f"fashion-cnn takes grey images of 28x28 (padded up to 32x32), got {got}; use features=inception-2015"
            )
        padding = (x.shape[-1] - 28) // 2
        return self.body(x[..., padding : padding + 28, padding : padding + 28])

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 1, 28, 28] in [-1, 1] -> "pool" [B, 128] and "logits" [B, 10]."""
        pooled = self.features(x)
        return {"pool": pooled, "logits": self.classify(pooled)}

    def classify(self, features: Tensor) -> Tensor:
        """[B, 128] -> logits [B, 10]."""
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 28, 28] in [-1, 1] -> logits [B, 10]."""
        return self.classify(self.features(x))
