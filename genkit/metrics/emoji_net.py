"""A small classifier of emoji: the offline feature net for RGB images on white.

Trained by scripts/train_emoji_net.py on the train split of the dataset `emoji`, to tell 16 classes and every single emoji apart under shifts,
turns and changes of scale and colour. Models are trained on the same images, of which there are no others: a distance it measures says how close
samples come to them, not whether they are new (see the metric memorisation).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import interpolate

from genkit.data.emoji import GROUPS
from genkit.errors import UsageError

WEIGHTS = Path(__file__).parent / "weights" / "emoji-cnn-v1.safetensors"
SHA256 = "ccc7e5411851a13aff0e692eb4bc693c2790b2ff3b745f6bb807a728e5118be5"
PROTOCOL = "emoji-cnn-v1"
SIDE = 64


def takes(shape: tuple[int, ...]) -> bool:
    """Whether images of this shape (C, Y, X) can be judged by the net."""
    return len(shape) == 3 and shape[0] == 3 and max(shape[1:]) <= 2 * SIDE


def _layer(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class EmojiCNN(nn.Module):
    """Five convolutions, 64 -> 32 -> 16 -> 8 -> 4 -> 2 pixels, then two linear layers: the images are centred, so that places mean something."""

    dims: ClassVar[dict[str, int]] = {"pool": 192, "logits": len(GROUPS)}
    class_names = tuple(GROUPS)
    chunk = 256  # images at once

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _layer(3, 24, 5, 2),  # [B, 24, 32, 32]
            _layer(24, 48, 3, 2),  # [B, 48, 16, 16]
            _layer(48, 96, 3),
            nn.MaxPool2d(2),
            _layer(96, 128, 3),  # [B, 128, 8, 8]
            nn.MaxPool2d(2),
            _layer(128, 128, 3),  # [B, 128, 4, 4]
            nn.MaxPool2d(2),
            nn.Flatten(),  # [B, 512]
            nn.Linear(128 * 2 * 2, self.dims["pool"], bias=False),
            nn.BatchNorm1d(self.dims["pool"]),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.dims["pool"], len(self.class_names))

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, Y, X] in [-1, 1] -> [B, 192], not negative. Other sizes than 64x64 are resized to that (bilinear, antialiased), whatever their shape."""
        if not takes(tuple(x.shape[1:])):
            got = "x".join(map(str, x.shape[1:]))
            raise UsageError(
                f"emoji-cnn takes RGB images of at most {2 * SIDE} pixels, got {got}; use features=inception-2015"
            )
        if x.shape[-2:] != (SIDE, SIDE):
            x = interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return self.body(x)

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, Y, X] in [-1, 1] -> "pool" [B, 192] and "logits" [B, 16]."""
        pooled = self.features(x)
        return {"pool": pooled, "logits": self.classify(pooled)}

    def classify(self, features: Tensor) -> Tensor:
        """[B, 192] -> logits [B, 16]."""
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, Y, X] in [-1, 1] -> logits [B, 16]."""
        return self.classify(self.features(x))
