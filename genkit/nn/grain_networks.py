"""Networks that see an image at several grains at once, routers that choose a grain for every region, and positions for the decoder.

Huang et al., "Dynamic Vector Quantization" (DQ-VAE), CVPR 2023, section 3.1; behaviour as in CrossmodalGroup/DynamicVectorQuantization
modules/dynamic_modules, so that its weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.nn import conv, taming
from genkit.nn.grain import entropy

NORM_GROUPS = 32  # of every group norm of the deep networks


class LightGrainEncoder(nn.Module):
    """Images -> features of G grids, coarse to fine, [B, channels, Y / (stride 2^(G-1)), ...] to [B, channels, Y / stride, X / stride]: a network each.

    All linear paths start as the same cosine transform; a coarse one as the mean of the fine codes it stands for, because the decoder takes
    a coarse code for several fine ones.
    """

    def __init__(
        self, *, image_channels: int, channels: int, stride: int, width: int, num_blocks: int, num_grains: int
    ):
        super().__init__()
        self.grains = nn.ModuleList(
            conv.Encoder(
                image_channels=image_channels,
                channels=channels,
                stride=stride * 2**level,
                width=width,
                num_blocks=num_blocks,
            )
            for level in reversed(range(num_grains))
        )
        for level, encoder in zip(reversed(range(num_grains)), self.grains, strict=True):
            fine = conv.patch_transform(stride, image_channels, channels).view(channels, image_channels, stride, stride)
            mean = fine.repeat(1, 1, 2**level, 2**level) / 4**level
            encoder.linear[1].weight = nn.Parameter(mean.reshape(channels, -1, 1, 1))  # type: ignore[index, union-attr]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [encoder(x) for encoder in self.grains]


class GrainEncoder(nn.Module):
    """The encoder of taming (genkit.nn.taming) with a way out after each of its last G levels, coarse to fine, [B, channels, ...] each.

    Args:
        widths: channels of every level, finest first; the fine grid is that of level len(widths) - G.
        num_blocks: residual blocks per level.
        attention: numbers of the levels with attention after each block.
        stem: channels of the first convolution; None = widths[0].
    """

    def __init__(
        self,
        *,
        image_channels: int,
        channels: int,
        widths: Sequence[int],
        num_blocks: int,
        attention: Sequence[int],
        num_grains: int,
        stem: int | None,
    ):
        super().__init__()
        dim = stem or widths[0]
        self.conv_in = nn.Conv2d(image_channels, dim, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            self.levels.append(
                taming.Level(
                    dim,
                    width,
                    num_blocks=num_blocks,
                    has_attention=i in attention,
                    groups=NORM_GROUPS,
                    resample=nn.Identity(),
                )
            )
            dim = width
        self.halves = nn.ModuleList(taming.Halve(width) for width in widths[:-1])
        ends = list(reversed(widths))[:num_grains]  # coarse to fine
        self.ends = nn.ModuleList(
            nn.Sequential(
                taming.middle(width, NORM_GROUPS, True),
                taming.group_norm(width, NORM_GROUPS),
                nn.SiLU(),
                nn.Conv2d(width, channels, 3, padding=1),
            )
            for width in ends
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.conv_in(x)
        grids = []
        for i, level in enumerate(self.levels):
            h = level(h if i == 0 else self.halves[i - 1](h))
            grids.append(h)
        return [end(h) for end, h in zip(self.ends, reversed(grids), strict=False)]


class EntropyRouter(nn.Module):
    """Codes a region finely where the entropy of its grey levels exceeds a threshold. It learns nothing.

    Args:
        patch_size: side of a region in pixels.
        thresholds: G - 1 rising entropies in nats; a region that exceeds g of them has grain g. See genkit.nn.grain.entropy_threshold.
    """

    def __init__(self, *, patch_size: int, thresholds: Sequence[float]):
        super().__init__()
        self.patch_size, self.thresholds = patch_size, tuple(thresholds)

    def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
        """Images, features (not looked at) -> [B, G, y, x], 1 for the chosen grain and 0 for the others."""
        limits = torch.tensor(self.thresholds, device=x.device)
        grain = torch.bucketize(entropy(x, self.patch_size), limits)  # limits[g - 1] < entropy <= limits[g]
        return F.one_hot(grain, len(self.thresholds) + 1).permute(0, 3, 1, 2).float()


class FeatureRouter(nn.Module):
    """Logits of the grains of every region, from the features of all grids.

    Args:
        channels: of the features.
        num_grains: G.
        norm_groups: of a group norm before the features are compared; 0 = none.
        hidden: width of a hidden layer; None = no hidden layer.
        activation: behind it.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_grains: int,
        norm_groups: int,
        hidden: int | None,
        activation: Literal["silu", "relu"] = "silu",
    ):
        super().__init__()
        self.norms = nn.ModuleList(
            nn.GroupNorm(norm_groups, channels, eps=1e-6) if norm_groups else nn.Identity() for _ in range(num_grains)
        )
        width = channels * num_grains
        layers: list[nn.Module] = [nn.Linear(hidden or width, num_grains)]
        if hidden:
            layers = [nn.Linear(width, hidden), nn.SiLU() if activation == "silu" else nn.ReLU(), *layers]
        self.gate = nn.Sequential(*layers)

    def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
        """Images (not looked at), features from coarse to fine -> logits [B, G, y, x]."""
        pooled = [
            F.avg_pool2d(norm(h), 2**g) if g else norm(h)
            for g, (norm, h) in enumerate(zip(self.norms, features, strict=True))
        ]
        return self.gate(torch.cat(pooled, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Positions(nn.Module):
    """Adds to every cell of [B, C, Y, X] where it is: without it a decoder cannot tell the equal cells of a coarse region apart.

    Args:
        side: of the largest grid.
        has_waves: sines of learned linear functions of (x, y) in [-1, 1].
        has_tables: a learned vector per row and per column.
    """

    def __init__(self, *, channels: int, side: int, has_waves: bool, has_tables: bool):
        super().__init__()
        self.side = side
        self.waves = nn.Conv2d(2, channels, 1) if has_waves else None
        if self.waves is not None:
            nn.init.uniform_(self.waves.weight, -math.sqrt(9 / 2), math.sqrt(9 / 2))
        self.rows = nn.Parameter(0.02 * torch.randn(side, channels)) if has_tables else None
        self.columns = nn.Parameter(0.02 * torch.randn(side, channels)) if has_tables else None

    def forward(self, h: Tensor) -> Tensor:
        _, _, Y, X = h.shape
        if self.waves is not None:
            y, x = torch.linspace(-1, 1, Y, device=h.device), torch.linspace(-1, 1, X, device=h.device)
            places = torch.stack([x.expand(Y, X), y[:, None].expand(Y, X)])[None].to(h.dtype)
            h = h + torch.sin(self.waves(places))
        if self.rows is not None and self.columns is not None:
            h = h + (self.rows[:Y, None] + self.columns[:X]).permute(2, 0, 1)
        return h
