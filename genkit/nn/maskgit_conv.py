"""Encoder and decoder of MaskGIT's VQGAN: residual blocks alone, means of 2x2 on the way down.

Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022, section 3.1, in the form whose weights are published,
bytedance/1d-tokenizer modeling/modules/maskgit_vqgan.py. Images are in [0, 1] inside: they enter and leave in [-1, 1] here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from genkit.nn.taming import Double, group_norm

GROUPS = 32  # of every group norm


class ResBlock(nn.Module):
    """x + h with h = conv3(silu(norm(conv3(silu(norm x))))), [B, C, Y, X] -> [B, dim, Y, X].

    Where C != dim it is h + shortcut(h): the port from JAX applies the shortcut to the block's own result, and its weights were made for that.
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.norm1 = group_norm(channels, GROUPS)
        self.conv1 = nn.Conv2d(channels, dim, 3, padding=1, bias=False)
        self.norm2 = group_norm(dim, GROUPS)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(dim, dim, 1, bias=False) if channels != dim else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(h))


def blocks(channels: int, dim: int, count: int) -> nn.Sequential:
    return nn.Sequential(*[ResBlock(channels if i == 0 else dim, dim) for i in range(count)])


class Encoder(nn.Module):
    """Images [B, image_channels, Y, X] in [-1, 1] -> [B, channels, Y / stride, X / stride], stride = 2^(levels - 1).

    Args:
        widths: channels of every level, from the image's own grid to the coarsest.
        stem: channels of the first convolution.
        num_blocks: residual blocks per level, and again at the end.
    """

    def __init__(self, *, image_channels: int, channels: int, widths: Sequence[int], stem: int, num_blocks: int):
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, stem, 3, padding=1, bias=False)
        before = [stem, *widths[:-1]]
        self.levels = nn.ModuleList(blocks(a, b, num_blocks) for a, b in zip(before, widths, strict=True))
        self.middle = blocks(widths[-1], widths[-1], num_blocks)
        self.norm_out = group_norm(widths[-1], GROUPS)
        self.conv_out = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in((x + 1) / 2)
        for i, level in enumerate(self.levels):
            h = level(h if i == 0 else F.avg_pool2d(h, 2))
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """The mirror of Encoder: [B, channels, Y, X] -> images [B, image_channels, stride Y, stride X], not limited to [-1, 1].

    `levels` and `doubles` hold the coarsest grid first.
    """

    def __init__(self, *, image_channels: int, channels: int, widths: Sequence[int], num_blocks: int):
        super().__init__()
        down = list(reversed(widths))
        self.conv_in = nn.Conv2d(channels, down[0], 3, padding=1)
        self.middle = blocks(down[0], down[0], num_blocks)
        self.levels = nn.ModuleList(blocks(a, b, num_blocks) for a, b in zip([down[0], *down[:-1]], down, strict=True))
        self.doubles = nn.ModuleList(Double(width) for width in down[:-1])
        self.norm_out = group_norm(down[-1], GROUPS)
        self.conv_out = nn.Conv2d(down[-1], image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(z))
        for i, level in enumerate(self.levels):
            h = level(h if i == 0 else self.doubles[i - 1](h))
        return 2 * self.conv_out(F.silu(self.norm_out(h))) - 1
