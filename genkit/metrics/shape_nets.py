"""Two small classifiers of the 12 classes of `shapes`, by points and by pictures: the offline judges of generated shapes.

Trained by scripts/train_shape_nets.py on shapes of a seed of their own, which no recipe trains on: their opinion of samples is independent. `PointNet` takes
points (Qi et al. 2017, arXiv:1612.00593, without its transformation nets), `ViewNet` grey shaded pictures.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from genkit.errors import UsageError
from genkit.weights import WeightsFile, read_state

FOLDER = Path(__file__).parent / "weights"
CLASS_NAMES = (
    "chair", "table", "lamp", "sofa", "bed", "shelf", "mug", "bottle", "airplane", "car", "rocket", "tool",
)  # fmt: skip
POINTS = 256  # that PointNet was trained on; of more, the maxima over them are a little larger
SIDE = 64  # pixels that ViewNet takes
SHA256 = {
    "shape-points-v1": "ff2868117880a15b69661eb354beb4a73ef7afecf6d4ccb84fa444e4d8952345",
    "shape-views-v1": "c892b533d8fddaac60b78b3049ffbf7cb2c8a2befa2feaa00905d6d4b9ad2ff5",
}


class PointNet(nn.Module):
    """Every point by itself, the maximum over all, two linear layers: the order of points has no say, their number a little.

    Shapes must stand upright and be scaled to a longest side of 1.6 around the origin.
    """

    protocol = "shape-points-v1"
    dims: ClassVar[dict[str, int]] = {"pool": 128, "logits": len(CLASS_NAMES)}

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 96, 192)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        self.each = nn.Sequential(*layers)
        self.body = nn.Sequential(
            nn.Linear(widths[-1], self.dims["pool"], bias=False), nn.BatchNorm1d(self.dims["pool"]), nn.ReLU()
        )
        self.head = nn.Linear(self.dims["pool"], len(CLASS_NAMES))

    def features(self, points: Tensor) -> Tensor:
        """[B, P, 3] -> [B, 128], not negative."""
        B, P, _ = points.shape
        return self.body(self.each(points.reshape(B * P, 3)).reshape(B, P, -1).amax(1))

    def forward(self, points: Tensor) -> Tensor:
        """[B, P, 3] -> logits [B, 12]."""
        return self.head(self.features(points))


class ViewNet(nn.Module):
    """Four convolutions over grey pictures as genkit.meshes.shading.shaded makes them, then two linear layers."""

    protocol = "shape-views-v1"
    dims: ClassVar[dict[str, int]] = {"pool": 96, "logits": len(CLASS_NAMES)}

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, 96)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            kernel = 5 if i == 0 else 3
            layers += [nn.Conv2d(before, after, kernel, 2, kernel // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(
            *layers,  # [B, 96, 4, 4]
            nn.Flatten(),
            nn.Linear(widths[-1] * 16, self.dims["pool"], bias=False),
            nn.BatchNorm1d(self.dims["pool"]),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.dims["pool"], len(CLASS_NAMES))

    def features(self, pictures: Tensor) -> Tensor:
        """[B, Y, Y] in [0, 1], white = 1, Y a multiple of 64 -> [B, 96], not negative."""
        if pictures.shape[-1] % SIDE or pictures.shape[-1] != pictures.shape[-2]:
            raise UsageError(
                f"shape-views takes square pictures of multiples of {SIDE} pixels, got {list(pictures.shape)}"
            )
        small = avg_pool2d(pictures[:, None], pictures.shape[-1] // SIDE)
        return self.body(1 - small)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, Y, Y] -> logits [B, 12]."""
        return self.head(self.features(pictures))


@functools.cache
def load(net: type[PointNet] | type[ViewNet]) -> PointNet | ViewNet:
    """A judge with its weights, frozen. Raises GenkitError when the file in the package is not the published one."""
    path = FOLDER / f"{net.protocol}.safetensors"
    WeightsFile(net.protocol, path.name, "", SHA256[net.protocol]).check(path)
    judge = net()
    judge.load_state_dict({key: value.float() for key, value in read_state(path, net.protocol).items()}, strict=False)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def features_and_logits(judge: PointNet | ViewNet, x: Tensor, chunk: int = 32) -> tuple[Tensor, Tensor]:
    """Features and logits of many inputs, a few at a time."""
    features = torch.cat([judge.features(part) for part in x.split(chunk)])
    return features, judge.head(features)
