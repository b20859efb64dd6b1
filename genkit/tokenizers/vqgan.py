"""VQGAN: images to a grid of ids through a deep convolutional network with attention, and back.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021; Sun et al., "Autoregressive Model Beats Diffusion: Llama for
Scalable Image Generation", 2024 (narrow codes of length 1). Differences from the papers: the codebook follows its assignments and recycles
codes that fall out of use (genkit.nn.codebook). Official weights are read by `genkit import`.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from genkit.nn.grid_tokenizer import GridTokenizer, check_sizes
from genkit.nn.quantize import Quantizer
from genkit.nn.straight_through import Gradient
from genkit.nn.taming import Decoder, Encoder, check_levels


class VQGAN(GridTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, 1, Y / stride, X / stride].

    Args:
        image_channels: 1 grey, 3 colour.
        widths: channels of every level, from the image's own grid to the coarsest; the stride is 2^(levels - 1).
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: numbers of the levels with attention after each block, 0 = the finest.
        mid_attention: attention between the last two blocks of the encoder and the first two of the decoder.
        channels: of z, the width of a code; 8 with `cosine` is LlamaGen's choice.
        neck: channels between the networks and the 1x1 convolutions that lead to the codes and back; null = no such convolutions.
        codebook_size: number of codes.
        cosine: codes and what is compared with them have length 1.
        norm_groups: of every group norm; must divide the widths.
        stem: channels of the encoder's first convolution; null = the first of the widths.
        decoder_widths, decoder_attention: where the decoder differs from the encoder.
        gradient: see genkit.tokenizers.vq.
        decay: share of the codebook's statistics kept per optimiser step.
        restart: codes used less than this fraction of the mean are replaced by vectors of the batch; 0 = never.

    Raises: UsageError for a width the groups do not divide, a level that does not exist or a size below 1.
    """

    num_levels = 1

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        widths: tuple[int, ...] = (128, 128, 256, 256, 512),
        num_blocks: int = 2,
        attention: tuple[int, ...] = (4,),
        mid_attention: bool = True,
        channels: int = 256,
        neck: int | None = 256,
        codebook_size: int = 1024,
        cosine: bool = False,
        norm_groups: int = 32,
        stem: int | None = None,
        decoder_widths: tuple[int, ...] | None = None,
        decoder_attention: tuple[int, ...] | None = None,
        gradient: Gradient = "straight_through",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        check_sizes(
            num_blocks=num_blocks,
            channels=channels,
            codebook_size=codebook_size,
            norm_groups=norm_groups,
            neck=neck or 1,
        )
        decoder_widths = widths if decoder_widths is None else decoder_widths
        decoder_attention = attention if decoder_attention is None else decoder_attention
        check_levels(widths, attention, norm_groups, stem)
        check_levels(decoder_widths, decoder_attention, norm_groups)
        self.image_channels, self.channels, self.codebook_size = image_channels, channels, codebook_size
        self.stride = 2 ** (len(widths) - 1)
        shape: dict[str, Any] = {
            "image_channels": image_channels,
            "channels": channels,
            "num_blocks": num_blocks,
            "mid_attention": mid_attention,
            "groups": norm_groups,
            "neck": neck,
        }
        self.encoder = Encoder(widths=widths, attention=attention, stem=stem, **shape)
        self.quantizer = Quantizer(
            dim=channels, codebook_size=codebook_size, cosine=cosine, gradient=gradient, decay=decay, restart=restart
        )
        self.decoder = Decoder(widths=decoder_widths, attention=decoder_attention, **shape)
        self.finish()
