"""What tokenizers that code an image scale after scale have in common: sizes, networks, the row of ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Encoded
from genkit.nn import conv, taming
from genkit.nn.grid_tokenizer import GridTokenizer, check_sizes
from genkit.nn.multiscale import ScaleQuantizer

NORM_GROUPS = 32  # of every group norm of the deep networks, as in VAR


class ScaleTokenizer(GridTokenizer):
    """What tokenizers with a ScaleQuantizer have in common: square images of one size, ids [B, 1, N] of all scales in a row, z on the finest grid.

    N is the sum of p^2 over `patch_sizes`; ids[:, 0] holds the 1x1 (or first) scale, then the next, each in row order. z [B, channels, p, p] with
    p = patch_sizes[-1] is the sum over the scales, which is what the decoder needs.
    """

    num_levels = 1
    patch_sizes: tuple[int, ...]
    quantizer: ScaleQuantizer
    enter: nn.Module  # between the networks and the quantiser
    leave: nn.Module

    def build(
        self,
        *,
        image_channels: int,
        channels: int,
        stride: int,
        width: int,
        num_blocks: int,
        widths: Sequence[int] | None,
        latent_kernel: int = 3,
        stem: int | None = None,
        quantizer: ScaleQuantizer,
    ) -> None:
        """All parts: what a subclass's constructor calls, with its own arguments.

        Args:
            width: of the light networks (genkit.nn.conv).
            widths: instead, channels of every level of deep networks (genkit.nn.taming), finest first, with attention on the coarsest, and with a
                convolution of `latent_kernel` between them and the quantiser: the networks of VAR.
            stem: with `widths`, channels of the encoder's first convolution; None = the first of them.
        """
        check_sizes(stride=stride, width=width, channels=channels, num_blocks=num_blocks)
        self.image_channels, self.channels, self.stride = image_channels, channels, stride
        self.patch_sizes, self.codebook_size = quantizer.patch_sizes, quantizer.codebook.embed.shape[1]
        self.quantizer = quantizer
        shape: dict[str, Any] = {"image_channels": image_channels, "channels": channels, "num_blocks": num_blocks}
        if widths is None:
            self.encoder = conv.Encoder(**shape, stride=stride, width=width)
            self.decoder = conv.Decoder(**shape, stride=stride, width=width)
            self.enter, self.leave = nn.Identity(), nn.Identity()
        else:
            if 2 ** (len(widths) - 1) != stride:
                raise UsageError(
                    f"tokenizer.widths={list(widths)} halve the image {len(widths) - 1} times, but tokenizer.stride={stride}"
                )
            if latent_kernel < 1 or latent_kernel % 2 == 0:
                raise UsageError(f"tokenizer.latent_kernel={latent_kernel} must be odd")
            taming.check_levels(widths, (), NORM_GROUPS)
            last = len(widths) - 1
            shape |= {
                "widths": widths,
                "attention": (last,),
                "mid_attention": True,
                "groups": NORM_GROUPS,
                "neck": None,
            }
            self.encoder = taming.Encoder(**shape, stem=stem)
            self.decoder = taming.Decoder(**shape)
            self.enter, self.leave = (
                nn.Conv2d(channels, channels, latent_kernel, padding=latent_kernel // 2) for _ in range(2)
            )
        self.finish()

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Of z; ids lie in a row."""
        return (self.patch_sizes[-1],) * 2

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.stride * self.patch_sizes[-1]

    def encode(self, x: Tensor) -> Encoded:
        """x [B, image_channels, image_size, image_size] in [-1, 1] -> z [B, channels, p, p], ids [B, 1, N], losses [B] each.

        Raises: UsageError for images of another size.
        """
        self.check_image(x)
        found = self.quantizer(self.features(x))
        return Encoded(self.scale(found.codes), found.ids[:, None], found.losses)

    def features(self, x: Tensor) -> Tensor:
        """Images -> [B, channels, p, p], what is quantised."""
        return self.enter(self.encoder(x.contiguous(memory_format=torch.channels_last)))

    def decode(self, z: Tensor) -> Tensor:
        """z [B, channels, p, p] -> images [B, image_channels, image_size, image_size], not limited to [-1, 1]."""
        return self.decoder(self.leave(self.unscale(z).contiguous(memory_format=torch.channels_last)))

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, 1, N] -> the z that encode returns with them; with the ids of the first scales alone, the coarse version of it."""
        self.check_ids(ids)
        return self.scale(self.quantizer.codes(ids[:, 0]))

    def next_inputs(self, ids: Tensor) -> Tensor:
        """ids [B, 1, N] -> [B, N - p_1^2, channels]: what a next-scale generator sees in place of the second scale onwards (teacher forcing): the
        sum of codes of the scales before, shrunk to the scale. Not scaled by the latent statistics. See ScaleQuantizer.add_scale for sampling."""
        self.check_ids(ids)
        return self.quantizer.next_inputs(ids[:, 0])

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        if x.shape[2:] != (self.image_size,) * 2:
            Y, X = x.shape[2:]
            raise UsageError(
                f"images are {Y}x{X}, but patch_sizes up to {self.patch_sizes[-1]} at stride {self.stride} mean {self.image_size}x{self.image_size}"
            )

    def check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 3 or ids.shape[1] != 1:
            raise UsageError(f"ids are {list(ids.shape)}, expected [B, 1, {self.quantizer.num_tokens}]")
        self.quantizer.split(ids[:, 0])
        super().check_ids(ids[..., None])
