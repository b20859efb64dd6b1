"""MaskGIT's VQGAN: images to a grid of ids through residual convolutions without attention, and back.

Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022; the tokenizer whose ids TiTok's first stage is taught with. Differences
from the paper: the codebook follows its assignments and recycles codes that fall out of use (genkit.nn.codebook).
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from genkit.nn.grid_tokenizer import GridTokenizer, check_sizes
from genkit.nn.maskgit_conv import GROUPS, Decoder, Encoder
from genkit.nn.quantize import Quantizer
from genkit.nn.straight_through import Gradient
from genkit.nn.taming import check_levels


class MaskgitVQGAN(GridTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, 1, Y / stride, X / stride].

    Args:
        image_channels: 1 grey, 3 colour.
        widths: channels of every level, from the image's own grid to the coarsest, multiples of 32; the stride is 2^(levels - 1).
        num_blocks: residual blocks per level.
        channels: of z, the width of a code.
        codebook_size: number of codes.
        stem: channels of the encoder's first convolution; null = the first of the widths.
        gradient: see genkit.tokenizers.vq.
        decay: share of the codebook's statistics kept per optimiser step.
        restart: codes used less than this fraction of the mean are replaced by vectors of the batch; 0 = never.

    Raises: UsageError for a width that is no multiple of 32 or a size below 1.
    """

    num_levels = 1

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        widths: tuple[int, ...] = (128, 128, 256, 256, 512),
        num_blocks: int = 2,
        channels: int = 256,
        codebook_size: int = 1024,
        stem: int | None = None,
        gradient: Gradient = "straight_through",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        check_sizes(num_blocks=num_blocks, channels=channels, codebook_size=codebook_size)
        check_levels(widths, (), GROUPS, stem)
        self.image_channels, self.channels, self.codebook_size = image_channels, channels, codebook_size
        self.stride = 2 ** (len(widths) - 1)
        shape: dict[str, Any] = {
            "image_channels": image_channels,
            "channels": channels,
            "num_blocks": num_blocks,
        }
        self.encoder = Encoder(widths=widths, stem=stem or widths[0], **shape)
        self.quantizer = Quantizer(
            dim=channels, codebook_size=codebook_size, gradient=gradient, decay=decay, restart=restart
        )
        self.decoder = Decoder(widths=widths, **shape)
        self.finish()
