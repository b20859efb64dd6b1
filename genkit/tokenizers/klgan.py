"""KL autoencoder with VQGAN's networks: the first stage of latent diffusion, diffusers' AutoencoderKL.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, section 3.1 and table 8. Official weights are read by
`genkit import`.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from genkit.nn.gaussian import GaussianTokenizer
from genkit.nn.grid_tokenizer import check_sizes
from genkit.nn.taming import Decoder, Encoder, check_levels


class KLGAN(GaussianTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride]; see GaussianTokenizer.

    Args:
        image_channels: 1 grey, 3 colour.
        widths: channels of every level, from the image's own grid to the coarsest; the stride is 2^(levels - 1).
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: numbers of the levels with attention after each block, 0 = the finest.
        mid_attention: attention between the last two blocks of the encoder and the first two of the decoder.
        channels: of z.
        neck: channels between the networks and the 1x1 convolutions beside z (the encoder has twice as many); null = no such convolutions.
        norm_groups: of every group norm; must divide the widths.
        stem: channels of the encoder's first convolution; null = the first of the widths.
        decoder_attention: where the decoder differs from the encoder.
        kl_weight: of the divergence from N(0, 1), in nats per number of the image.

    Raises: UsageError for a width the groups do not divide, a level that does not exist or a size below 1.
    """

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        widths: tuple[int, ...] = (128, 256, 512, 512),
        num_blocks: int = 2,
        attention: tuple[int, ...] = (),
        mid_attention: bool = True,
        channels: int = 4,
        neck: int | None = 4,
        norm_groups: int = 32,
        stem: int | None = None,
        decoder_attention: tuple[int, ...] | None = None,
        kl_weight: float = 1e-6,
    ):
        super().__init__()
        check_sizes(num_blocks=num_blocks, channels=channels, norm_groups=norm_groups, neck=neck or 1)
        decoder_attention = attention if decoder_attention is None else decoder_attention
        check_levels(widths, attention, norm_groups, stem)
        check_levels(widths, decoder_attention, norm_groups)
        self.image_channels, self.channels, self.kl_weight = image_channels, channels, kl_weight
        self.stride = 2 ** (len(widths) - 1)
        shape: dict[str, Any] = {
            "image_channels": image_channels,
            "widths": widths,
            "num_blocks": num_blocks,
            "mid_attention": mid_attention,
            "groups": norm_groups,
        }
        self.encoder = Encoder(
            channels=2 * channels, neck=2 * neck if neck else None, attention=attention, stem=stem, **shape
        )
        self.decoder = Decoder(channels=channels, neck=neck, attention=decoder_attention, **shape)
        self.finish()
