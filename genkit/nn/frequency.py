"""A feature map as a sum of frequency bands.

Huang et al., "NFIG: Autoregressive Image Generation with Next-Frequency Prediction", 2025, section 3.2: band i holds the radial frequencies up to
sigma_i = sigma_{i-1} + (p_i^2 / sum_j p_j^2) sigma_max. The paper leaves open what sigma_max is; here it is the largest frequency of the grid (the corner
of the spectrum) and the first band holds the mean, so that every frequency is in exactly one band and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def radius(side: int) -> Tensor:
    """[side, side // 2 + 1]: distance from frequency zero of every coefficient of torch.fft.rfft2, 1 at the corner of the spectrum."""
    rows, columns = torch.fft.fftfreq(side), torch.fft.rfftfreq(side)  # cycles per cell
    distance = (rows[:, None].square() + columns.square()).sqrt()
    return distance / distance.max().clamp_min(1e-12)


class FrequencyBands(nn.Module):
    """[B, C, p, p] -> [K, B, C, p, p], low frequencies first; the sum over K is the input.

    Args:
        patch_sizes: p_k of K scales. The width of band k grows with p_k^2; p is the last one.
    """

    masks: Tensor  # [K, p, p // 2 + 1], 1 where a coefficient belongs to the band; sums to 1 over K

    def __init__(self, patch_sizes: Sequence[int]):
        super().__init__()
        areas = torch.tensor([float(p * p) for p in patch_sizes])
        limits = (
            areas.cumsum(0) / areas.sum()
        )  # [K]; the first limit below each radius is counted, so rounding of the last one does no harm
        band = torch.bucketize(radius(patch_sizes[-1]), limits[:-1])  # limits[i - 1] < radius <= limits[i]
        of_band = torch.arange(len(patch_sizes))[:, None, None] == band
        self.register_buffer("masks", of_band.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """In float32: the transforms of half-precision numbers lose the weak high frequencies."""
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfft2(x.float())  # [B, C, p, p // 2 + 1]
            return torch.fft.irfft2(self.masks[:, None, None] * spectrum, s=x.shape[-2:])
