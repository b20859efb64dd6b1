"""How different two images look to a network: squared differences of its features at several depths.

Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016, with the features of a place scaled to length 1 as in
LPIPS (Zhang et al., CVPR 2018, eq. 1). Unlike LPIPS no weights of channels were fitted to people's judgements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureDistance(nn.Module):
    """Distance of pairs of images by the activations of a frozen network.

    Args:
        body: convolutions, in order. What follows its first nn.Flatten is not used: a loss over places tells a tokenizer where it is wrong.
        side: pixels per side that images are brought to first (bilinear); None = as they are.

    Raises: ValueError for a body without a convolution.
    """

    def __init__(self, body: nn.Sequential, side: int | None = None):
        super().__init__()
        stages = []
        for layer in body:
            if isinstance(layer, nn.Flatten):
                break
            stages.append(layer)
        if not any(isinstance(m, nn.Conv2d) for stage in stages for m in stage.modules()):
            raise ValueError("a perceptual distance needs a network that begins with convolutions")
        self.stages, self.side = nn.ModuleList(stages), side
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        """It stays in evaluation mode: its norms use the statistics of its own training."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B, C, Y, X] in [-1, 1] -> [B], 0 = equal; the mean over depths. Differentiable in both."""
        found = [
            (a - b).square().sum(1).mean((1, 2)) for a, b in zip(self._directions(x), self._directions(y), strict=True)
        ]
        return torch.stack(found).mean(0)

    def _directions(self, x: Tensor) -> list[Tensor]:
        """Vectors of length 1 at every place after each stage that has a convolution."""
        if self.side is not None and x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True)
        found = []
        for stage in self.stages:
            x = stage(x)
            if any(isinstance(layer, nn.Conv2d) for layer in stage.modules()):
                # vector_norm, because the derivative of the square root of a sum of squares is NaN where all are zero.
                found.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8))
        return found
