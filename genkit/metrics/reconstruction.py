"""How close reconstructions are to their images: PSNR, SSIM, and the Fréchet distance of the two sets (rFD, rFID)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from genkit.errors import UsageError
from genkit.metrics import features as nets
from genkit.metrics.frechet import Frechet

_RANGE = 2.0  # of pixels in [-1, 1]
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(range^2 / mean squared error), range 2.

    Args:
        x, y: [B, C, Y, X] in [-1, 1].

    Returns: [B] float64; equal images, whose ratio is infinite, count as 100 dB.
    """
    return decibels((x.double() - y.double()).square().flatten(1).mean(1)).cpu()


def decibels(error: Tensor) -> Tensor:
    """Mean squared errors of images in [-1, 1] -> PSNR in dB; at most 100."""
    return 10 * torch.log10(_RANGE**2 / error.clamp_min(_RANGE**2 * 1e-10))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, eq. 13): 11x11 Gaussian window, sigma 1.5, K1 0.01, K2 0.03, range 2.

    The mean over all places where the window fits and over channels; no down-scaling first.

    Args:
        x, y: [B, C, Y, X] in [-1, 1], at least 11x11.

    Returns: [B] float64, at most 1. Raises UsageError for smaller images.
    """
    channels, height, width = x.shape[1:]
    if min(height, width) < _WINDOW:
        raise UsageError(f"SSIM looks through an {_WINDOW}x{_WINDOW} window; images of {height}x{width} are smaller")
    x, y = x.double(), y.double()  # variances are differences of large numbers
    maps = torch.cat([x, y, x * x, y * y, x * y], dim=1)
    distance = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    window = torch.softmax(-distance.square() / (2 * _SIGMA**2), 0)
    planes = maps.flatten(0, 1).unsqueeze(1)  # [B * 5 C, 1, Y, X]
    means = conv2d(conv2d(planes, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    mx, my, xx, yy, xy = means.reshape(len(x), 5, channels, *means.shape[-2:]).unbind(1)
    similarity = ((2 * mx * my + _C1) * (2 * (xy - mx * my) + _C2)) / (
        (mx.square() + my.square() + _C1) * (xx - mx.square() + yy - my.square() + _C2)
    )
    return similarity.flatten(1).mean(1).cpu()


class Reconstruction:
    """PSNR and SSIM of pairs, means over images, and the Fréchet distance between originals and reconstructions.

    Images are rounded to 8 bits first, as they would be in a file.

    Args:
        features: feature net of the Fréchet distance; null = leave it out.
        count: images to reconstruct; null = the whole split.
        weights: of the feature net: a file, or a folder that holds it.
    """

    better: Literal["lower", "higher"] = "higher"

    def __init__(self, *, features: str | None = "fashion-cnn", count: int | None = None, weights: str | None = None):
        self.count = count
        self.frechet = Frechet(features=features, weights=weights) if features is not None else None
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in ("psnr", "ssim", "images")}

    @property
    def net(self) -> nets.FeatureNet | None:
        return self.frechet.net if self.frechet is not None else None

    @property
    def protocol(self) -> str:
        net = f", {self.frechet.protocol}" if self.frechet else ""
        return f"8 bits, PSNR mean over images, SSIM 11x11 sigma 1.5{net}"

    def update(self, *, real: nets.ImageBatch | Tensor, fake: nets.ImageBatch | Tensor, **_: Any) -> None:
        """Images and their reconstructions, both [B, C, Y, X] in [-1, 1], in the same order."""
        real, fake = nets.as_batch(real), nets.as_batch(fake)
        self.sums["psnr"] += psnr(real.x, fake.x).sum()
        self.sums["ssim"] += ssim(real.x, fake.x).sum()
        self.sums["images"] += len(real)
        if self.frechet is not None:
            self.frechet.update(real=real, fake=fake)

    def state(self) -> dict[str, Tensor]:
        return self.sums | (self.frechet.state() if self.frechet else {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        for name, value in self.sums.items():
            value.copy_(state[name])
        if self.frechet is not None:
            self.frechet.restore(state)

    def result(self) -> dict[str, float]:
        """{"PSNR": dB, "SSIM": at most 1, "rFID", "rFID-quick" or "rFD (net)", as frechet_name says: distance}."""
        images = self.sums["images"]
        if not images:
            raise UsageError("reconstruction has seen no images")
        distance = {f"r{name}": value for name, value in self.frechet.result().items()} if self.frechet else {}
        return {"PSNR": float(self.sums["psnr"] / images), "SSIM": float(self.sums["ssim"] / images), **distance}

    def notes(self) -> list[str]:
        return [f"r{note}" for note in self.frechet.notes()[:1]] if self.frechet else []
