"""What the objectives of noisy latents share."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.interfaces import Layout
from genkit.nn.layout import rows_of_one_size, sizes_of
from genkit.rng import Rng


def noise_like(target: Tensor, layout: Layout, rng: Rng) -> Tensor:
    """Standard normal noise [B, C, *grid], 0 at padding. A sample has the noise of its own size, whatever else is in the batch."""
    sizes = sizes_of(layout)
    if sizes is None:
        return rng.fork("noise").normal(*target.shape[1:])
    noise = torch.zeros_like(target)
    for size, rows in rows_of_one_size(sizes):
        own = Rng(rng.seeds[rows], rng.stream).fork("noise").normal(target.shape[1], *size).to(noise)
        around = [
            pad
            for length, full in zip(reversed(size), reversed(target.shape[2:]), strict=True)
            for pad in (0, full - length)
        ]
        noise[rows] = torch.nn.functional.pad(own, around)
    return noise


def per_sample(values: Tensor, layout: Layout) -> Tensor:
    """[B, C, *grid] -> their means [B], over what is real."""
    if layout.valid is None:
        return values.flatten(1).mean(1)
    is_real = layout.valid.unsqueeze(1)  # [B, 1, cells]
    total = torch.where(is_real, values.flatten(2), 0).sum((1, 2))
    return total / (values.shape[1] * is_real.sum((1, 2)).clamp_min(1))
