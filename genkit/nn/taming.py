"""Encoder and decoder of VQGAN: residual blocks on ever coarser grids, attention on the coarsest.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021, table 7. The same networks carry LlamaGen's tokenizers, the
first stages of latent diffusion and diffusers' VQModel and AutoencoderKL. Differences from CompVis/taming-transformers: attention belongs to
levels instead of resolutions, so that any image size works; the 1x1 convolutions beside the quantiser ("quant_conv") are parts of the networks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from genkit.errors import UsageError


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """shortcut(x) + conv3(silu(norm(conv3(silu(norm x))))), [B, C, Y, X] -> [B, dim, Y, X]. The shortcut is a 1x1 convolution where C != dim."""

    def __init__(self, channels: int, dim: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, dim, 3, padding=1)
        self.norm2 = group_norm(dim, groups)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.shortcut = nn.Identity() if channels == dim else nn.Conv2d(channels, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """x + out(attention(norm x)) with one head over all places of the grid, [B, C, Y, X] -> the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, Y, X = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(B, 1, Y * X, 3 * C)
        mixed = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # [B, 1, N, C]
        return x + self.out(mixed.reshape(B, Y, X, C).permute(0, 3, 1, 2))


class Halve(nn.Conv2d):
    """[B, C, Y, X] -> [B, C, Y / 2, X / 2]. The zeros stand at the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Conv2d):
    """[B, C, Y, X] -> [B, C, 2 Y, 2 X]: every place becomes 2x2, then a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks on one grid, each followed by attention where the level has it, then the way to the next grid."""

    def __init__(
        self, channels: int, dim: int, *, num_blocks: int, has_attention: bool, groups: int, resample: nn.Module
    ):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels if i == 0 else dim, dim, groups) for i in range(num_blocks))
        self.attention = nn.ModuleList(Attention(dim, groups) for _ in range(num_blocks if has_attention else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[i](x)
        return self.resample(x)


def middle(dim: int, groups: int, has_attention: bool) -> nn.Sequential:
    """What stands at the coarsest grid of both networks."""
    between = Attention(dim, groups) if has_attention else nn.Identity()
    return nn.Sequential(ResBlock(dim, dim, groups), between, ResBlock(dim, dim, groups))


class Encoder(nn.Module):
    """Images [B, image_channels, Y, X] -> [B, channels, Y / stride, X / stride], stride = 2^(levels - 1).

    Args:
        widths: channels of every level, from the image's own grid to the coarsest.
        stem: channels of the first convolution; None = widths[0].
        num_blocks: residual blocks per level.
        attention: numbers of the levels with attention after each block.
        mid_attention: attention between the last two blocks.
        groups: of the group norms; must divide every width.
        neck: channels before the last, 1x1 convolution; None = no such convolution.
    """

    def __init__(
        self,
        *,
        image_channels: int,
        channels: int,
        widths: Sequence[int],
        stem: int | None,
        num_blocks: int,
        attention: Sequence[int],
        mid_attention: bool,
        groups: int,
        neck: int | None,
    ):
        super().__init__()
        last = len(widths) - 1
        dim = stem or widths[0]
        self.conv_in = nn.Conv2d(image_channels, dim, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = Halve(width) if i < last else nn.Identity()
            has_attention = i in attention
            self.levels.append(
                Level(dim, width, num_blocks=num_blocks, has_attention=has_attention, groups=groups, resample=resample)
            )
            dim = width
        self.middle = middle(dim, groups, mid_attention)
        self.norm_out = group_norm(dim, groups)
        self.conv_out = nn.Conv2d(dim, neck or channels, 3, padding=1)
        self.project = nn.Conv2d(neck, channels, 1) if neck else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        h = self.middle(h)
        return self.project(self.conv_out(F.silu(self.norm_out(h))))


class Decoder(nn.Module):
    """The mirror of Encoder, with one block more per level: [B, channels, Y, X] -> [B, image_channels, stride Y, stride X], without limits.

    The arguments are Encoder's; `widths` and `attention` count levels from the finest here too, `num_blocks` is the encoder's number.
    `levels` holds them in the order they are passed, the coarsest first.
    """

    def __init__(
        self,
        *,
        image_channels: int,
        channels: int,
        widths: Sequence[int],
        num_blocks: int,
        attention: Sequence[int],
        mid_attention: bool,
        groups: int,
        neck: int | None,
    ):
        super().__init__()
        dim = widths[-1]
        self.project = nn.Conv2d(channels, neck, 1) if neck else nn.Identity()
        self.conv_in = nn.Conv2d(neck or channels, dim, 3, padding=1)
        self.middle = middle(dim, groups, mid_attention)
        self.levels = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            resample = Double(width) if i > 0 else nn.Identity()
            has_attention = i in attention
            self.levels.append(
                Level(
                    dim, width, num_blocks=num_blocks + 1, has_attention=has_attention, groups=groups, resample=resample
                )
            )
            dim = width
        self.norm_out = group_norm(dim, groups)
        self.conv_out = nn.Conv2d(dim, image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(self.project(z)))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def check_levels(widths: Sequence[int], attention: Sequence[int], groups: int, stem: int | None = None) -> None:
    """Raises UsageError for widths the group norms cannot divide, and for attention at a level that does not exist."""
    if not widths or any(width < 1 or width % groups for width in widths):
        raise UsageError(f"tokenizer.widths={list(widths)} must be multiples of {groups}, the groups of every norm")
    if stem is not None and (stem < 1 or stem % groups):
        raise UsageError(f"tokenizer.stem={stem} must be a multiple of {groups}, the groups of every norm")
    if outside := [level for level in attention if not 0 <= level < len(widths)]:
        raise UsageError(f"tokenizer.attention names level {outside[0]}, but the levels are 0 to {len(widths) - 1}")
