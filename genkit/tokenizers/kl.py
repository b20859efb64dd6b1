"""KL autoencoder: images to a grid of continuous latents and back, with networks that work on coarse grids.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, section 3.1. Differences from the paper: the networks
of genkit.nn.conv, many times faster than the paper's, which are in `klgan`.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from genkit.nn.conv import Decoder, Encoder
from genkit.nn.gaussian import GaussianTokenizer
from genkit.nn.grid_tokenizer import check_sizes


class KL(GaussianTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride]; see GaussianTokenizer.

    Args:
        image_channels: 1 grey, 3 colour.
        stride: pixels per latent along each axis, a power of two.
        width: channels of the networks on the coarsest grid; finer grids are narrower.
        num_blocks: residual blocks on every grid, in the encoder and again in the decoder.
        channels: of z.
        kl_weight: of the divergence from N(0, 1), in nats per number of the image.

    Raises: UsageError for a stride that is no power of two or a size below 1.
    """

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        stride: int = 4,
        width: int = 128,
        num_blocks: int = 2,
        channels: int = 4,
        kl_weight: float = 1e-6,
    ):
        super().__init__()
        check_sizes(stride=stride, width=width, channels=channels)
        self.image_channels, self.channels, self.stride, self.kl_weight = image_channels, channels, stride, kl_weight
        shape: dict[str, Any] = {
            "image_channels": image_channels,
            "stride": stride,
            "width": width,
            "num_blocks": num_blocks,
        }
        self.encoder = Encoder(channels=2 * channels, **shape)
        self.decoder = Decoder(channels=channels, **shape)
        self.finish()
